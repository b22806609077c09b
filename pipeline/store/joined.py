"""Several sources of photos, one behind the other, as one data set."""

import os
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from ibeton.pipeline.store.beton import BetonReader
from ibeton.pipeline.store.photos import FolderPhotos, Photos, open_photos


def open_all(paths: str | Sequence[str]) -> Photos:
    """Open one or several of .beton files, photo folders and tars; their photos keep their order.

    Raises FileNotFoundError or ValueError, naming the path, for what is none of them, and
    ValueError for a path that is given twice.
    """
    paths = (paths,) if isinstance(paths, str) else tuple(paths)
    if len(paths) == 1:
        return open_photos(paths[0])
    real = [os.path.realpath(path) for path in paths]
    if twice := [path for i, path in enumerate(paths) if real[i] in real[:i]]:
        raise ValueError(f"--data {twice[0]} is given twice; name it once")
    parts = [open_photos(path) for path in paths]
    files = [part for part in parts if isinstance(part, BetonReader)]
    return JoinedBeton(files) if len(files) == len(parts) else JoinedPhotos(parts)


class JoinedPhotos:
    """Photos of folders, tars and .beton files. Classes are matched by name. Labels of a part
    without class names stay as they are if no part has names, else they are -1, unlabeled."""

    def __init__(self, parts: Sequence[BetonReader | FolderPhotos]) -> None:
        self._parts = parts
        self._starts = np.array([0, *accumulate(len(part) for part in parts)])
        self.classes = sorted({name for part in parts for name in part.classes})
        self.labels = np.concatenate([self._labels(part) for part in parts])
        self.notes = [note for part in parts for note in part.notes]

    def _labels(self, part: Photos) -> np.ndarray:
        if not self.classes:
            return part.labels
        place = {name: number for number, name in enumerate(self.classes)}
        numbers = np.array([*(place[name] for name in part.classes), -1])
        known = (part.labels >= 0) & (part.labels < len(part.classes))
        return numbers[np.where(known, part.labels, -1)].astype(np.int64)

    def _place(self, index: int) -> tuple[BetonReader | FolderPhotos, int]:
        """The part that holds photo `index`, and its place there."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part], int(index - self._starts[part])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def photo_bytes(self, index: int) -> bytes:
        part, place = self._place(index)
        return part.photo_bytes(place)

    def pixels(self, index: int) -> np.ndarray:
        part, place = self._place(index)
        return part.pixels(place)

    def name(self, index: int) -> str:
        part, place = self._place(index)
        return part.name(place)


class JoinedBeton(JoinedPhotos, BetonReader):
    """Several .beton files, with the arrays of a single one, so that the ffcv loader reads them."""

    def __init__(self, parts: Sequence[BetonReader]) -> None:
        super().__init__(parts)
        for name in ("modes", "widths", "heights", "pointers", "sizes", "files"):
            setattr(self, name, np.concatenate([getattr(part, name) for part in parts]))
