"""The progress of an unfinished conversion, so that the same command resumes after `kill -9`.

While DST.beton is being written, two files are beside it: `.DST.beton.partial`, the file itself,
and `.DST.beton.journal`. The journal's first line holds the source and the options, each other line
a mark: how many photos are done, and what happened since the previous mark. A mark is written after
its data have reached the disk, so it is true after a power cut as well. Each line begins with its
CRC-32; a line that was cut off is ignored.

The journal is locked while a conversion runs; the lock ends with the process.
"""

import fcntl
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ibeton.options import flag
from ibeton.pipeline.store.beton_writer import BetonWriter, open_unlinked, write_all

MARK_EVERY_S = 2.0  # the most that a kill costs; a thread flushes the disk as often


@dataclass
class Done:
    """What a conversion has done so far. counts: photos by how they were stored."""

    photos: int = 0  # of the source, readable or not
    counts: dict[str, int] = field(default_factory=dict)
    unlabeled: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    checksums: list[int] = field(default_factory=list)  # of each block of samples


def partial_path(dst: Path) -> Path:
    return dst.with_name(f".{dst.name}.partial")


def journal_path(dst: Path) -> Path:
    return dst.with_name(f".{dst.name}.journal")


def left_behind(dst: Path) -> str:
    """What to say about the unfinished conversion to `dst`; empty if there is none."""
    if not partial_path(dst).exists():
        return ""
    return (
        f"what was done is kept in {partial_path(dst)}: the same command resumes it, --restart"
        " starts over"
    )


class Journal:
    """The marks of a conversion to `dst`, of this run and of earlier ones.

    binding: what must be the same for a conversion to be resumed. stamp(first, end): a number that
    changes if one of these source photos does.

    Use as a context manager around the writer's. If the block raises, marked progress is kept,
    unless the block called `discard`; if it ends normally, nothing is.

    Raises FileExistsError while another conversion to `dst` runs.
    """

    def __init__(
        self, dst: Path, binding: dict[str, Any], stamp: Callable[[int, int], int], restart: bool
    ) -> None:
        self.dst, self.done = dst, Done()
        self._binding, self._stamp = binding, stamp
        self._file = _locked(journal_path(dst), dst)
        if restart or not partial_path(dst).exists():
            os.truncate(self._file, 0)
        self._keep = os.fstat(self._file).st_size > 0  # there is progress worth keeping
        self._marked = (0, 0, 0)  # photos, samples, unreadable at the last mark
        self._last = time.monotonic()  # time of the last mark
        self._disk = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._disk.shutdown(wait=True)
        if error is None or not self._keep:
            if not isinstance(error, FileExistsError):  # else it is a user's link
                partial_path(self.dst).unlink(missing_ok=True)
            journal_path(self.dst).unlink(missing_ok=True)
        os.close(self._file)

    def discard(self) -> None:
        """Keep nothing: what was done is useless."""
        self._disk.shutdown(wait=True)  # a mark under way would say otherwise
        self._keep = False

    def resume(self, writer: BetonWriter) -> None:
        """Restore `done` and the writer as of the last mark, or start anew if there is none.

        Raises ValueError for the progress of another conversion."""
        sizes = [np.zeros(0, np.uint64)]
        end, page, whole = 0, writer.page_size, 0
        for content, at in _whole_lines(journal_path(self.dst)):
            whole = at
            if "stamp" not in content:
                self._check_binding(content)
                continue
            if self._stamp(self.done.photos, content["photos"]) != content["stamp"]:
                raise ValueError(f"photos have changed since they were read{self._advice()}")
            self._take(content)
            sizes.append(np.array(content["sizes"], np.uint64))
            end, page = content["end"], content["page"]
        os.truncate(self._file, whole)
        if not whole:
            self._append(_line(self._binding))
        try:
            writer.resume(np.concatenate(sizes), end, page)
        except ValueError as error:
            raise ValueError(f"{error}{self._advice()}") from error
        self._keep = len(sizes) > 1
        self._marked = (self.done.photos, writer.count, len(self.done.unreadable))

    def _check_binding(self, found: dict[str, Any]) -> None:
        differ = []
        for name, value in self._binding.items():
            old = found.get(name)
            if name == "options":
                for key in value:
                    if (before := (old or {}).get(key)) != value[key]:
                        differ.append(f"{flag(key)} was {before!r} and is {value[key]!r}")
            elif old != value:
                told = "has changed" if name == "list of photos" else f"was {old} and is {value}"
                differ.append(f"its {name} {told}")
        if differ:
            raise ValueError(
                f"the unfinished conversion to {self.dst} is a different one:"
                f" {'; '.join(differ)}{self._advice()}"
            )

    def _advice(self) -> str:
        return f"; --restart removes its progress ({partial_path(self.dst)}) and starts over"

    def _take(self, mark: dict[str, Any]) -> None:
        done = self.done
        done.photos, done.counts = mark["photos"], mark["counts"]
        done.unlabeled = mark["unlabelled"]
        done.unreadable += [(name, reason) for name, reason in mark["unreadable"]]
        done.checksums[mark["block"] :] = mark["checksums"]

    def tick(self, writer: BetonWriter, block: int) -> None:
        """Leave a mark every MARK_EVERY_S; to be called between photos. `block`: samples per
        checksum. Raises OSError if the disk did not take the data of the previous mark."""
        now = time.monotonic()
        busy = self._pending and not self._pending.done()
        if busy or now - self._last < MARK_EVERY_S:
            return
        self.settle()
        photos, samples, unreadable = self._marked
        done, first = self.done, samples // block
        mark = {
            "photos": done.photos,
            "stamp": self._stamp(photos, done.photos),
            "end": writer.end,
            "page": writer.page_size,
            "counts": done.counts,
            "unlabelled": done.unlabeled,
            "unreadable": done.unreadable[unreadable:],
            "block": first,
            "checksums": done.checksums[first:],
            "sizes": writer.sizes(samples),
        }
        line = _line(mark)
        writer.write_metadata(samples)
        self._pending = self._disk.submit(self._flush, os.dup(writer.file), line)
        self._marked = (done.photos, writer.count, len(done.unreadable))
        self._last = now

    def settle(self) -> None:
        """Wait for the last mark; to be called before the file is sealed. Raises OSError if the
        disk did not take its data: the kernel says so once, and a later fsync succeeds."""
        if self._pending:
            self._pending.result()

    def _flush(self, data: int, line: bytes) -> None:
        try:
            os.fsync(data)
        finally:
            os.close(data)  # a duplicate: the writer may have closed its own
        self._append(line)
        self._keep = True

    def _append(self, line: bytes) -> None:
        write_all(self._file, line, os.fstat(self._file).st_size)
        os.fsync(self._file)


def _line(content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _whole_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each line before the first damaged one, and where it ends."""
    whole = 0
    with open(path, "rb") as file:
        for line in file:
            crc, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
                return
            whole += len(line)
            yield json.loads(text), whole


def _locked(path: Path, dst: Path) -> int:
    """Open or create the journal for this process alone."""
    while True:
        file = open_unlinked(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise FileExistsError(
                f"another conversion is writing {dst}; wait for it, or give another name"
            ) from None
        except OSError:
            pass  # a file system without locks
        if path.exists() and os.path.samestat(os.fstat(file), os.stat(path)):
            return file
        os.close(file)  # the run that held it has ended and removed it
