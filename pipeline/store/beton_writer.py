"""Writes .beton files (the format is described in `beton.py`) without FFCV."""

import errno
import fcntl
import glob
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np

from ibeton.atomic import replacing, sync_folder
from ibeton.pipeline.store.beton import (
    ALLOCATION,
    FIELD,
    FIELDS,
    FIRST_PAGE,
    HEADER,
    JPG,
    MAX_PHOTO,
    MAX_SIDE,
    METADATA_START,
    RAW,
    SAMPLE,
    VERSION,
    sidecar_path,
)


class BetonWriter:
    """Writes a .beton file that appears under its name only when it is complete.

    `most`: the maximum number of samples; their metadata has its place before the data. Use as a
    context manager: append, then `seal` and `publish`; without those nothing is left. `partial`:
    the file's name while it is unfinished. With it, the writer opens an existing file, which can be
    resumed, and leaves it there: the caller removes it.

    Pages are 8 MiB and grow to the power of two that holds the largest photo. A photo inside a
    small page is also inside the larger page around it, so data need not move. FFCV's process cache
    holds whole pages in memory: for it, keep raw photos small with `--max-resolution`.
    """

    def __init__(self, path: str | Path, most: int, partial: Path | None = None) -> None:
        self.path = Path(path)
        self.partial = partial or self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        self.page_size = FIRST_PAGE
        self.count = 0
        self._samples = np.zeros(most, SAMPLE)  # memory is taken as they are filled
        self._table = np.zeros(most, ALLOCATION)
        self.end = _aligned(METADATA_START + self._samples.nbytes, FIRST_PAGE)
        self._theirs = partial is not None
        if not self._theirs:
            _remove_left(self.path)
        how = os.O_RDWR | os.O_CREAT | (0 if self._theirs else os.O_EXCL)
        try:
            self.file = open_unlinked(self.partial, how)
        except FileExistsError as error:
            if self._theirs:
                raise
            raise FileExistsError(
                f"{self.partial} exists: another conversion is writing {self.path.name}, or was"
                " killed; remove it if none is running"
            ) from error
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def __enter__(self) -> "BetonWriter":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        os.close(self.file)
        if not self._theirs:
            self.partial.unlink(missing_ok=True)

    def resume(self, sizes: np.ndarray, end: int, page_size: int) -> None:
        """Continue an unfinished file. `sizes`: bytes of each sample in it; the last one ends at
        `end`, behind which the file is truncated. Raises ValueError if it is too short."""
        count = len(sizes)
        samples = os.pread(self.file, count * SAMPLE.itemsize, METADATA_START)
        if os.fstat(self.file).st_size < end or len(samples) < count * SAMPLE.itemsize:
            raise ValueError(f"{self.partial} is shorter than what was written to it")
        os.truncate(self.file, end if count else 0)
        self._samples[:count] = np.frombuffer(samples, SAMPLE)
        self._table["sample_id"][:count] = np.arange(count)
        self._table["ptr"][:count] = self._samples["image"]["data_ptr"][:count]
        self._table["size"][:count] = sizes
        self.count, self.page_size = count, page_size
        self.end = end if count else self.end

    def sizes(self, first: int) -> list[int]:
        """Stored bytes of the samples from number `first` on."""
        return self._table["size"][first : self.count].tolist()

    def append(
        self, label: int, mode: int, width: int, height: int, data: bytes | memoryview
    ) -> None:
        """Add one sample. Raises ValueError for a size or a mode that the format cannot hold."""
        if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
            raise ValueError(f"{width} x {height} pixels: a side must be 1 to {MAX_SIDE}")
        if mode not in (JPG, RAW) or (mode == RAW and len(data) != width * height * 3):
            raise ValueError(f"mode {mode} with {len(data)} bytes for {width} x {height} pixels")
        if not 0 < len(data) <= MAX_PHOTO:
            raise ValueError(f"{len(data):,} bytes: a photo must have 1 to {MAX_PHOTO:,}")
        while len(data) > self.page_size:
            self.page_size *= 2
        if self.end % self.page_size + len(data) > self.page_size:
            self.end = _aligned(self.end, self.page_size)
        write_all(self.file, data, self.end)
        self._samples[self.count] = ((mode, width, height, self.end), label)
        self._table[self.count] = (self.count, self.end, len(data))
        self.end += len(data)
        self.count += 1

    def write_metadata(self, first: int = 0) -> None:
        """Write the metadata of the samples from number `first` on to its place in the file."""
        begin = METADATA_START + first * SAMPLE.itemsize
        write_all(self.file, self._samples[first : self.count].view(np.uint8).data, begin)

    def seal(self) -> Path:
        """Write tables and header and sync to disk; returns the file's temporary name."""
        table_start = _aligned(self.end, 8)
        os.ftruncate(self.file, table_start)  # also where there are no samples
        write_all(self.file, self._table[: self.count].view(np.uint8).data, table_start)
        header = (VERSION, len(FIELDS), self.page_size, self.count, table_start)
        fields = [(type_id, name, b"") for type_id, name in FIELDS]
        begin = np.array(header, HEADER).tobytes() + np.array(fields, FIELD).tobytes()
        write_all(self.file, begin, 0)
        self.write_metadata()
        os.fsync(self.file)
        return self.partial

    def publish(self, sidecar: dict[str, Any]) -> None:
        """Give the sealed file its name, and write the JSON.

        The old JSON is removed first and the new one comes last, so none describes another file.
        All of it is on the disk when this returns.
        """
        beside = sidecar_path(self.path)
        content = {**sidecar, "file_bytes": self.partial.stat().st_size}
        with replacing(beside) as partial:
            with open(partial, "w", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=1))
                file.flush()
                os.fsync(file.fileno())
            beside.unlink(missing_ok=True)
            os.replace(self.partial, self.path)
        sync_folder(self.path.parent)


def write_all(file: int, data: bytes | memoryview, position: int) -> None:
    """Write all of `data` to the open file, from byte `position` on."""
    rest = memoryview(data)
    while rest:  # the system takes at most 2 GiB at once, and less on a full disk
        written = os.pwrite(file, rest, position)
        rest, position = rest[written:], position + written


def _remove_left(path: Path) -> None:
    """Remove the unfinished files of `path` whose writers were killed: nobody has locked them or
    written to them for an hour."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        number = left.name.split(".")[-2]
        if left.name != f".{path.name}.{number}.partial" or not number.isdigit():
            continue
        with suppress(OSError):
            if time.time() - left.stat().st_mtime < 3600:
                continue  # of a file system without locks, perhaps
            file = open_unlinked(left, os.O_RDWR)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(file)


def open_unlinked(path: Path, how: int) -> int:
    """`os.open` of a file of this program. A link, through which another file would be written, is
    refused with FileExistsError."""
    try:
        file = os.open(path, how | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise FileExistsError(f"{path} is a symbolic link; remove it") from error
    stat = os.fstat(file)
    if stat.st_nlink > 1 or not S_ISREG(stat.st_mode):
        os.close(file)
        raise FileExistsError(f"{path} is a link, or not a file; remove it")
    return file


def _aligned(position: int, page: int) -> int:
    return -(-position // page) * page
