"""What an unfinished conversion has done, so that the same command resumes after `kill -9`.

Beside DST.beton stand, while it is being made, `.DST.beton.partial` (the file itself) and
`.DST.beton.journal`: a line that binds both to the source and the options, then a line a mark. A
mark tells how many photos are done and what came of those since the mark before; it is written
after their bytes have reached the disk, so that what it tells is there also after a power cut. A
line begins with its CRC-32: one that was cut off in writing is left out.

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
from types import TracebackType
from typing import Any

import numpy as np

from ibeton.options import flag
from ibeton.pipeline.store.beton_writer import BetonWriter, open_unlinked

MARK_EVERY_S = 2.0  # what a kill may cost; the disk is flushed as often, by a thread


@dataclass
class Done:
    """What a conversion has done so far. counts: photos by how they were stored."""

    photos: int = 0  # of the source, readable or not
    counts: dict[str, int] = field(default_factory=dict)
    unlabelled: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    checksums: list[int] = field(default_factory=list)  # of each block of samples


def partial_path(dst: Path) -> Path:
    return dst.with_name(f".{dst.name}.partial")


def journal_path(dst: Path) -> Path:
    return dst.with_name(f".{dst.name}.journal")


def left_behind(dst: Path) -> str:
    """What to say of the unfinished conversion to `dst`; empty where there is none."""
    if not partial_path(dst).exists():
        return ""
    return (
        f"what was done is kept in {partial_path(dst)}: the same command continues from there,"
        " --restart begins anew"
    )


class Journal:
    """The marks of a conversion to `dst`, of this run and of those before it.

    binding: what has to be the same for a conversion to go on. stamp(first, end): a number that
    changes when one of these source photos does.

    Use as a context manager around the writer's. What was marked is left behind when the block
    raises, unless it called `discard`, and nothing when it ends.

    Raises FileExistsError while another conversion to `dst` runs, and, from `resume`, ValueError
    where what was left behind is of another source or other options.
    """

    def __init__(
        self, dst: Path, binding: dict[str, Any], stamp: Callable[[int, int], int], restart: bool
    ) -> None:
        self.dst, self.done = dst, Done()
        self._binding, self._stamp = binding, stamp
        self._file = _locked(journal_path(dst), dst)
        if restart or not partial_path(dst).exists():
            os.truncate(self._file, 0)
        self._untouched = os.fstat(self._file).st_size > 0  # what an earlier run left behind
        self._marked = (0, 0, 0)  # photos, samples, unreadable at the last mark
        self._marks = 0
        self._last: float | None = None  # the time of the last mark
        self._disk = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._disk.shutdown(wait=True)
        if not self.keeps(error):
            partial_path(self.dst).unlink(missing_ok=True)
            journal_path(self.dst).unlink(missing_ok=True)
        os.close(self._file)

    def discard(self) -> None:
        """What was done is no good: keep nothing of it."""
        self._marks = -1

    def keeps(self, error: BaseException | None) -> bool:
        """Whether something is left behind when the block ends by `error`."""
        return error is not None and (self._marks > 0 or self._untouched)

    # ---- going on ----

    def resume(self, writer: BetonWriter) -> None:
        """Put `done` and the writer where the last mark was, or at the start where there is none.

        Raises Refused for what is of another conversion."""
        sizes = [np.zeros(0, np.uint64)]
        end, page, whole = 0, writer.page_size, 0
        for content, at in _whole_lines(journal_path(self.dst)):
            whole = at
            if "stamp" not in content:
                self._check_binding(content)
                continue
            if self._stamp(self.done.photos, content["photos"]) != content["stamp"]:
                raise Refused(f"photos have changed since they were read{self._advice()}")
            self._take(content)
            sizes.append(np.array(content["sizes"], np.uint64))
            end, page = content["end"], content["page"]
        os.truncate(self._file, whole)
        if not whole:
            self._append(_line(self._binding))
        try:
            writer.go_on(np.concatenate(sizes), end, page)
        except ValueError as error:
            raise Refused(f"{error}{self._advice()}") from error
        self._untouched = False
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
            raise Refused(
                f"an unfinished conversion to {self.dst} is another one:"
                f" {'; '.join(differ)}{self._advice()}"
            )

    def _advice(self) -> str:
        return f"; --restart removes what is left of it ({partial_path(self.dst)}) and begins anew"

    def _take(self, mark: dict[str, Any]) -> None:
        done = self.done
        done.photos, done.counts, done.unlabelled = (
            mark[name] for name in ("photos", "counts", "unlabelled")
        )
        done.unreadable += [(name, reason) for name, reason in mark["unreadable"]]
        done.checksums[mark["block"] :] = mark["checksums"]
        self._marks += 1

    # ---- marking ----

    def tick(self, writer: BetonWriter, block: int) -> None:
        """Leave a mark from time to time; to be called when `done` tells of whole photos. `block`:
        samples under one checksum. Raises OSError when the disk does not take what was written."""
        now = time.monotonic()
        if self._last is None:
            self._last = now
        busy = self._pending and not self._pending.done()
        if busy or now - self._last < MARK_EVERY_S:
            return
        if self._pending:
            self._pending.result()
        photos, samples, unreadable = self._marked
        done, first = self.done, samples // block
        mark = {
            "photos": done.photos,
            "stamp": self._stamp(photos, done.photos),
            "end": writer.end,
            "page": writer.page_size,
            "counts": done.counts,
            "unlabelled": done.unlabelled,
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

    def _flush(self, data: int, line: bytes) -> None:
        try:
            os.fsync(data)
        finally:
            os.close(data)  # a copy: the writer may be gone by now
        self._append(line)
        self._marks += 1

    def _append(self, line: bytes) -> None:
        os.lseek(self._file, 0, os.SEEK_END)
        os.write(self._file, line)
        os.fsync(self._file)


class Refused(ValueError):
    """What an unfinished conversion left behind does not go with the command."""


def _line(content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _whole_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each line up to the first that is damaged, and where it ends."""
    whole = 0
    with open(path, "rb") as file:
        for line in file:
            crc, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
                return
            whole += len(line)
            yield json.loads(text), whole


def _locked(path: Path, dst: Path) -> int:
    """Open the journal, made where it is missing, for this process alone."""
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
        os.close(file)  # the run that held it ended, and removed it
