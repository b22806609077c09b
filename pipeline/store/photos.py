"""Photos of a .beton file, a folder or a tar, by index."""

from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np

from ibeton.pipeline.store.beton import JPG, BetonReader
from ibeton.pipeline.store.decode import UnreadablePhoto, decode_photo
from ibeton.pipeline.store.sources import Source, open_source, read_bytes
from ibeton.pipeline.store.turbojpeg import library, thread_decoder

_LOOKED_AT = 16  # photos of a folder whose size is looked at


class Photos(Protocol):
    """A data set of photos: a BetonReader or FolderPhotos."""

    labels: np.ndarray  # int64 [n], -1 if unlabeled
    classes: list[str]
    notes: list[str]  # what a user should know about the set, such as skipped files

    def __len__(self) -> int: ...

    def photo_bytes(self, index: int) -> bytes | memoryview:
        """The photo as it is stored; raises UnreadablePhoto."""

    def pixels(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3]; raises UnreadablePhoto."""

    def name(self, index: int) -> str:
        """The photo's name in messages."""


class FolderPhotos:
    """Photos of a folder or a tar, in the source's sorted order."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.labels = np.array([photo.label for photo in source.photos], dtype=np.int64)
        self.classes, self.notes = source.classes, source.notes()

    def __len__(self) -> int:
        return len(self._source.photos)

    def photo_bytes(self, index: int) -> bytes:
        try:
            return read_bytes(self._source.photos[index])
        except OSError as error:  # removed, or made unreadable, since it was listed
            raise UnreadablePhoto(str(error)) from error

    def pixels(self, index: int) -> np.ndarray:
        return decode_photo(self.photo_bytes(index))

    def name(self, index: int) -> str:
        return self._source.photos[index].name


def is_beton(path: str | Path) -> bool:
    return Path(path).suffix == ".beton"


def open_photos(path: str | Path) -> BetonReader | FolderPhotos:
    """Open a .beton file, a photo folder or a tar.

    Raises FileNotFoundError or ValueError, naming the path, if it is none of them.
    """
    return BetonReader(path) if is_beton(path) else FolderPhotos(open_source(path))


def turbo_pixels(reader: BetonReader, index: int) -> np.ndarray:
    """uint8 [H, W, 3] of a JPEG by libjpeg-turbo: Pillow's pixels in half of the time.

    Raises UnreadablePhoto, and OSError if the library is missing.
    """
    size = int(reader.heights[index]), int(reader.widths[index])
    return thread_decoder().decode(reader.photo_bytes(index), *size)


class TurboPhotos(BetonReader):
    """A .beton whose JPEGs libjpeg-turbo decodes."""

    def pixels(self, index: int) -> np.ndarray:
        if self.modes[index] == JPG:
            with suppress(UnreadablePhoto):
                return turbo_pixels(self, index)
        return super().pixels(index)  # reads more kinds of files, and says why it cannot


def open_fast(path: str | Path) -> BetonReader | FolderPhotos:
    """As `open_photos`; where libjpeg-turbo is installed, it decodes the photos of a .beton."""
    try:
        library()
    except OSError:
        return open_photos(path)
    return TurboPhotos(path) if is_beton(path) else open_photos(path)


def typical_side(photos: Photos) -> int:
    """Median of the shorter sides in pixels; of a folder, of 16 photos. 0 if none can be read."""
    if isinstance(photos, BetonReader):
        return int(np.median(np.minimum(photos.heights, photos.widths)))
    sides = []
    for index in np.linspace(0, len(photos) - 1, _LOOKED_AT).astype(int).tolist():
        try:
            sides.append(min(photos.pixels(index).shape[:2]))
        except UnreadablePhoto:
            continue
    return int(np.median(sides)) if sides else 0
