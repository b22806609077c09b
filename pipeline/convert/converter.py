"""Any source of photos -> one .beton file.

    ibeton convert SRC DST.beton       SRC: photo folder, tar, tar of class tars
    ibeton convert DST.beton --verify  read an existing file back

JPEGs are stored unchanged if their structure is complete. Unreadable photos are left out and
listed, with reasons, in DST.beton.json. The file appears only when it is complete; after an
interrupt, a failure or `kill -9` the same command resumes. `--shard 2/8` converts the second of
eight parts; `ibeton merge` combines them.
"""

import os
import sys
import time
import warnings
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL

from ibeton.atomic import partial_name
from ibeton.command import Failure, amount, explain, run_command
from ibeton.options import Parser, add_options, fill
from ibeton.pipeline.convert.journal import Done, Journal, left_behind, partial_path
from ibeton.pipeline.convert.plan import ConvertOptions, chosen, listing, shard, stamp
from ibeton.pipeline.convert.stored import StoredPhoto, Unopened, checksum, store_photos
from ibeton.pipeline.convert.verify import BLOCK, verify, verify_existing
from ibeton.pipeline.store.beton import sidecar_path
from ibeton.pipeline.store.beton_writer import BetonWriter
from ibeton.pipeline.store.sources import UNLABELED, Photo, Source, is_readable, open_source
from ibeton.progress import progress
from ibeton.workers import cores, in_order, in_threads

_CHUNK = 8  # photos per job: enough to hide its cost, few enough for memory


@dataclass
class ConversionReport:
    """What a conversion did: `photos` are stored, `before` were done by an interrupted one."""

    path: Path
    classes: list[str]
    photos: int
    done: Done
    before: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)  # on the source

    def lines(self) -> list[str]:
        """The report for the screen."""
        done, size = self.done, self.path.stat().st_size / 1e6
        how = ", ".join(f"{count:,} {name}" for name, count in sorted(done.counts.items()))
        rate = (done.photos - self.before) / max(self.seconds, 1e-9)
        lines = [
            f"{self.path}: {self.photos:,} photos ({how or 'none readable'}),"
            f" {len(self.classes):,} classes, {size:,.1f} MB, {self.seconds:.1f} s,"
            f" {rate:.0f} photos/s"
        ]
        if self.before:
            lines.append(f"resumed after {self.before:,} photos of an unfinished conversion")
        lines += [_printable(note) for note in self.notes]
        if done.unlabeled:
            lines.append(
                f"photos outside of class folders, stored without a label: {done.unlabeled:,}"
            )
        if done.unreadable:
            lines.append(f"{len(done.unreadable):,} unreadable, all listed in {self.path}.json:")
            lines += [f"  {_printable(name)}: {reason}" for name, reason in done.unreadable[:5]]
        return lines


def convert(
    src: str | Path, dst: str | Path, options: ConvertOptions | None = None
) -> ConversionReport:
    """Write the photos of `src` to `dst`, in sorted order unless shuffled, and `dst`.json beside.

    The file depends neither on the number of workers nor on interrupts. Raises ValueError,
    FileNotFoundError or FileExistsError for bad input (also if no photo is readable, except in a
    shard, or an unfinished `dst` has another source or other options), RuntimeError if a worker
    dies or `--verify` finds a difference. Progress is kept, and the same call resumes, except after
    bad input and failed verification.
    """
    options = options or ConvertOptions()
    options.check()
    dst = Path(dst)
    check_destination(dst, options.overwrite)
    source, started = open_source(src), time.monotonic()
    every = chosen(source, options)
    digest, photos = listing(every), shard(every, options)
    binding = {
        "source": source.path,
        "list of photos": digest,
        "options": options.content(),
        "Pillow": PIL.__version__,
    }

    with (
        Journal(dst, binding, lambda i, j: stamp(photos[i:j]), options.restart) as journal,
        BetonWriter(dst, len(photos), partial_path(dst)) as writer,
    ):
        journal.resume(writer)
        done, before = journal.done, journal.done.photos
        try:
            _write(writer, photos, options, journal)
        except (FileNotFoundError, PermissionError) as error:  # on the way: no bad input
            raise Failure(explain(error)) from error
        if not writer.count and not options.shard:  # an empty shard can be merged
            journal.discard()
            name, reason = done.unreadable[0]
            raise ValueError(
                f"{src}: none of {len(photos):,} photos is readable ({name}: {reason})"
            )
        journal.settle()
        partial = writer.seal()
        if options.verify:
            workers = options.workers or cores()
            problems = verify(str(partial), done.checksums, len(source.classes), workers)
            if problems:
                journal.discard()
                raise Failure(f"{len(problems)} faults on reading back: {problems[0]}")
        report = ConversionReport(dst, source.classes, writer.count, done, before)
        report.notes = source.notes()
        writer.publish(_sidecar(source, options, report, digest))
    report.seconds = time.monotonic() - started
    return report


def _printable(name: str) -> str:
    """The name with escapes for what is not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def check_destination(dst: Path, overwrite: bool) -> None:
    """Raise ValueError or an OSError, naming `dst`, if no .beton file can be written there."""
    if dst.suffix != ".beton":
        raise ValueError(f"{dst} must end in .beton, by which the loaders know the format")
    if not dst.parent.is_dir():
        raise FileNotFoundError(f"the folder {dst.parent} does not exist; make it first")
    longest = partial_name(sidecar_path(dst)).name  # of the names to come
    length, limit = len(os.fsencode(longest)), 0
    with suppress(OSError):
        limit = os.pathconf(dst.parent, "PC_NAME_MAX")
    if 0 < limit < length:  # some file systems say 0 or -1: unknown
        raise ValueError(f"the name {dst.name} is too long by {amount(length - limit, 'byte')}")
    if dst.is_dir():
        raise ValueError(f"{dst} is a folder; give the name of a file")
    if not os.access(dst.parent, os.W_OK):
        raise PermissionError(f"the folder {dst.parent} is not writable; give another for DST")
    if dst.exists() and not overwrite:
        raise FileExistsError(f"{dst} exists; --overwrite replaces it")


def _write(
    writer: BetonWriter, photos: list[Photo], options: ConvertOptions, journal: Journal
) -> None:
    """Store all readable photos that are still to do."""
    done, good = journal.done, None
    with closing(_stored(photos[done.photos :], options)) as results:
        for photo, stored in results:
            if isinstance(stored, Unopened):
                stored = _once_more(photo, options, good)
            if isinstance(stored, str):
                done.unreadable.append((photo.name, stored))
            else:
                _append(writer, photo, stored, done)
                good = photo
            done.photos += 1
            journal.tick(writer, BLOCK)


def _once_more(photo: Photo, options: ConvertOptions, good: Photo | None) -> StoredPhoto | str:
    """Read a photo again whose file could not be read: its folder may have been away for a moment.
    Returns what to store, or why it is unreadable. Raises Failure if the folder is still away.
    `good`: the last photo that could be read."""
    (stored,) = store_photos(([photo], options))
    folder = os.path.dirname(os.path.join(photo.path, photo.name))
    if isinstance(stored, Unopened) and not _is_there(folder, good):
        raise Failure(f"{photo.name} cannot be read ({stored}): is {folder} still there?")
    return stored


def _is_there(folder: str, good: Photo | None) -> bool:
    """Whether the file system of a folder answers, and has the photo `good`, or any file, still."""
    with suppress(OSError):
        os.statvfs(folder)  # asks the server, while a photo may come from memory
        if good is not None:
            return is_readable(good)
        with os.scandir(folder) as entries:
            return any(entries)
    return False


def _append(writer: BetonWriter, photo: Photo, stored: StoredPhoto, done: Done) -> None:
    if writer.count % BLOCK == 0:
        done.checksums.append(0)
    sample = (photo.label, stored.mode, stored.width, stored.height, memoryview(stored.data))
    writer.append(*sample)
    done.checksums[-1] = checksum(done.checksums[-1], *sample)
    done.counts[stored.how] = done.counts.get(stored.how, 0) + 1
    done.unlabeled += photo.label == UNLABELED


def _stored(
    photos: list[Photo], options: ConvertOptions
) -> Generator[tuple[Photo, StoredPhoto | str], None, None]:
    """Each photo with what to store, or why it is unreadable."""
    if not photos:
        return  # all done by an earlier run
    starts = range(0, len(photos), _CHUNK)
    jobs = ((photos[i : i + _CHUNK], options) for i in starts)
    workers = min(options.workers or cores(), len(starts))
    # Usual photos are stored unchanged, which costs less than sending them through a pipe.
    if options.write_mode == "keep" and not options.max_resolution:
        spread = in_threads(store_photos, jobs, workers, most=2 * workers)
    else:
        spread = in_order(store_photos, jobs, workers)
    with (
        progress("convert", len(photos)) as advance,
        warnings.catch_warnings(),
        closing(spread) as results,
    ):
        warnings.simplefilter("ignore")  # Pillow's, about photos
        for i, stored in zip(starts, results, strict=True):
            chunk = photos[i : i + _CHUNK]
            yield from zip(chunk, stored, strict=True)
            advance(len(chunk))


def _sidecar(
    source: Source, options: ConvertOptions, report: ConversionReport, digest: str
) -> dict[str, Any]:
    """The JSON beside the file; the same for any number of workers."""
    return {
        "source": source.path,
        "listing": digest,
        "options": options.content(),
        "classes": report.classes,
        "photos": report.photos,
        "unlabelled": report.done.unlabeled,
        "counts": report.done.counts,
        "unreadable": report.done.unreadable,
        "checksums": {"samples": BLOCK, "crc32": report.done.checksums},
    }


def _convert_command(src: str, dst: str, options: ConvertOptions) -> int:
    """Convert and print the report; after a failure, say what is kept."""
    try:
        print("\n".join(convert(src, dst, options).lines()))
        return 0
    except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError):
        raise  # bad input
    except KeyboardInterrupt:
        what, status = "interrupted", 130
    except (OSError, RuntimeError) as error:
        what, status = f"error: {error}", 1
    print(f"{what}; {left_behind(Path(dst)) or 'nothing was written'}", file=sys.stderr)
    return status


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for bad input, 1 for a failure on the way."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers are the parallelism
    parser = Parser(prog="python -m pipeline.convert", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("src", help="photo folder, tar, tar of class tars; or a .beton to verify")
    parser.add_argument("dst", nargs="?", help="the .beton file to write")
    add_options(parser, ConvertOptions)
    given = vars(parser.parse_args(argv))
    options = fill(ConvertOptions, given)

    def act() -> int:
        if given["dst"] is not None:
            return _convert_command(given["src"], given["dst"], options)
        if not options.verify:
            raise ValueError("DST is missing: give the .beton file to write, or --verify")
        options.check()
        faults, good = verify_existing(given["src"], options.workers)
        print("\n".join(faults) or good)
        return 1 if faults else 0

    return run_command(act, writes=given["dst"] is not None)
