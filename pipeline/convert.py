"""Any source of photos -> one .beton file.

    python -m pipeline.convert SRC DST.beton       SRC: photo folder, tar, tar of class tars
    python -m pipeline.convert DST.beton --verify  read an existing file back

JPEGs are stored as they are, after a full decode proved them whole. Photos that cannot be read are
left out and listed, with reasons, in DST.beton.json. The file appears only when it is whole.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from options import Parser, add_options, fill, flag, option
from pipeline.beton import BetonReader, BetonWriter
from pipeline.command import run_command
from pipeline.progress import progress
from pipeline.sources import UNLABELLED, Photo, Source, open_source
from pipeline.stored import WRITE_MODES, Storage, StoredPhoto, checksum, store_photos
from pipeline.verify import BLOCK, verify
from pipeline.workers import cores, in_order

_CHUNK = 8  # photos a job: enough to hide its cost, few enough to hold in memory


@dataclass(frozen=True)
class ConvertOptions:
    """How to store the photos. Defaults lose nothing: JPEGs keep their bytes."""

    max_resolution: int = option(0, "shrink photos whose longer side has more pixels (0: none)")
    quality: int = option(90, "JPEG quality where a photo is encoded, 1 to 100")
    write_mode: str = option(
        "keep", "keep JPEG bytes; jpg: encode all anew; raw: pixels; smart: by size", WRITE_MODES
    )
    smart_threshold: int = option(0, "smart: bytes of pixels above which a photo becomes JPEG")
    workers: int = option(0, "worker processes (0: the cores at hand)")
    shuffle: bool = option(False, "store in random order")
    seed: int = option(0, "seed of --shuffle")
    subset: int = option(0, "store so many photos, evenly spread or, with --shuffle, random")
    verify: bool = option(False, "read every stored photo back before the file gets its name")
    overwrite: bool = option(False, "replace an existing DST")

    def check(self) -> None:
        """Raise ValueError, naming the option, for values that cannot work."""
        for name in ("max_resolution", "smart_threshold", "workers", "seed", "subset"):
            if getattr(self, name) < 0:
                raise ValueError(f"{flag(name)} {getattr(self, name)}: expected 0 or more")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality {self.quality}: expected 1 to 100")
        if self.write_mode not in WRITE_MODES:
            raise ValueError(f"--write-mode {self.write_mode}: expected {', '.join(WRITE_MODES)}")
        if (self.write_mode == "smart") != (self.smart_threshold > 0):
            raise ValueError("--write-mode smart and --smart-threshold BYTES go together")

    def storage(self) -> Storage:
        return Storage(self.write_mode, self.quality, self.max_resolution, self.smart_threshold)


@dataclass
class ConversionReport:
    """What a conversion did. counts: photos by how they were stored (kept, encoded, raw)."""

    path: Path
    classes: list[str]
    photos: int = 0
    unlabelled: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """The report for the screen."""
        how = ", ".join(f"{count:,} {name}" for name, count in sorted(self.counts.items()))
        size, rate = self.path.stat().st_size / 1e6, self.photos / max(self.seconds, 1e-9)
        lines = [
            f"{self.path}: {self.photos:,} photos ({how}), {len(self.classes):,} classes,"
            f" {size:,.1f} MB, {self.seconds:.1f} s, {rate:.0f} photos/s"
        ]
        if self.unlabelled:
            lines.append(f"{self.unlabelled:,} photos stand in no class folder: unlabelled (-1)")
        if self.unreadable:
            lines.append(f"{len(self.unreadable):,} unreadable, all listed in {self.path}.json:")
            lines += [f"  {_printable(name)}: {reason}" for name, reason in self.unreadable[:5]]
        return lines


def convert(
    src: str | Path, dst: str | Path, options: ConvertOptions | None = None
) -> ConversionReport:
    """Write the photos of `src` to `dst`, in sorted order unless shuffled, and `dst`.json beside.

    The file does not depend on the number of workers. Raises ValueError, FileNotFoundError or
    FileExistsError for bad input (also when no photo at all is readable), RuntimeError when a
    worker dies or `--verify` finds a difference; whatever is raised, nothing is left behind.
    """
    options = options or ConvertOptions()
    options.check()
    dst = Path(dst)
    _check_destination(dst, options.overwrite)
    source, started = open_source(src), time.monotonic()
    photos = _chosen(source, options)
    report = ConversionReport(dst, source.classes)
    with BetonWriter(dst, len(photos)) as writer:
        checksums = _write(writer, photos, options, report)
        if not writer.count:
            name, reason = report.unreadable[0]
            raise ValueError(
                f"{src}: none of {len(photos):,} photos is readable ({name}: {reason})"
            )
        partial = writer.seal()
        if options.verify:
            workers = options.workers or cores()
            problems = verify(str(partial), checksums, len(source.classes), workers)
            if problems:
                raise RuntimeError(f"{len(problems)} faults on reading back: {problems[0]}")
        writer.publish(_sidecar(source, options, report, checksums))
    report.seconds = time.monotonic() - started
    return report


def _printable(name: str) -> str:
    """File names need not be UTF-8; what is not is escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def _check_destination(dst: Path, overwrite: bool) -> None:
    if dst.suffix != ".beton":
        raise ValueError(f"{dst} must end in .beton, by which the loaders know the format")
    if not dst.parent.is_dir():
        raise FileNotFoundError(f"the folder {dst.parent} does not exist; make it first")
    if dst.is_dir():
        raise ValueError(f"{dst} is a folder; give the name of a file")
    if not os.access(dst.parent, os.W_OK):
        raise PermissionError(f"the folder {dst.parent} is not writable; give another for DST")
    if dst.exists() and not overwrite:
        raise FileExistsError(f"{dst} exists; --overwrite replaces it")


def _chosen(source: Source, options: ConvertOptions) -> list[Photo]:
    """The photos to store, in the order to store them."""
    total = len(source.photos)
    if options.subset > total:
        raise ValueError(f"--subset {options.subset}: {source.path} has {total:,} photos")
    wanted = options.subset or total
    if options.shuffle:
        order = np.random.default_rng(options.seed).permutation(total)[:wanted]
    else:
        order = np.arange(wanted) * total // wanted
    return [source.photos[i] for i in order]


def _write(
    writer: BetonWriter, photos: list[Photo], options: ConvertOptions, report: ConversionReport
) -> list[int]:
    """Store all readable photos; returns the checksum of each block of samples."""
    checksums: list[int] = []
    with closing(_stored(photos, options)) as results:
        for photo, stored in results:
            if isinstance(stored, str):
                report.unreadable.append((photo.name, stored))
                continue
            if writer.count % BLOCK == 0:
                checksums.append(0)
            size, data = (stored.width, stored.height), memoryview(stored.data)
            writer.append(photo.label, stored.mode, *size, data)
            checksums[-1] = checksum(checksums[-1], photo.label, stored.mode, *size, data)
            report.counts[stored.how] = report.counts.get(stored.how, 0) + 1
            report.unlabelled += photo.label == UNLABELLED
    report.photos = writer.count
    return checksums


def _stored(
    photos: list[Photo], options: ConvertOptions
) -> Generator[tuple[Photo, StoredPhoto | str], None, None]:
    """Each photo with what is to be stored of it, or why it is unreadable."""
    chunks = [photos[i : i + _CHUNK] for i in range(0, len(photos), _CHUNK)]
    jobs = ((chunk, options.storage()) for chunk in chunks)
    workers = min(options.workers or cores(), len(chunks))
    with (
        progress("convert", len(photos)) as advance,
        closing(in_order(store_photos, jobs, workers)) as results,
    ):
        for chunk, stored in zip(chunks, results, strict=True):
            yield from zip(chunk, stored, strict=True)
            advance(len(chunk))


def _sidecar(
    source: Source, options: ConvertOptions, report: ConversionReport, checksums: list[int]
) -> dict[str, Any]:
    """What stands in the JSON beside the file; the same for any number of workers."""
    passing = ("workers", "verify", "overwrite")
    kept = {k: v for k, v in dataclasses.asdict(options).items() if k not in passing}
    return {
        "source": source.path,
        "options": kept,
        "classes": report.classes,
        "photos": report.photos,
        "unlabelled": report.unlabelled,
        "counts": report.counts,
        "unreadable": report.unreadable,
        "checksums": {"samples": BLOCK, "crc32": checksums},
    }


def verify_existing(path: str, workers: int) -> tuple[list[str], str]:
    """Faults of a finished .beton, and what can be said of it where there are none: without its
    JSON (FFCV's own files) photos are decoded only."""
    reader = BetonReader(path)
    noted = reader.sidecar.get("checksums", {})
    crc32 = noted["crc32"] if noted.get("samples") == BLOCK else None
    faults = verify(path, crc32, len(reader.classes), workers or cores())
    if crc32 is None:
        return faults, f"{path}: every photo decodes; no checksums beside it to compare with"
    return faults, f"{path}: every photo reads as written"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for bad input, 1 for a failure on the way."""
    parser = Parser(prog="python -m pipeline.convert", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("src", help="photo folder, tar, tar of class tars; or a .beton to verify")
    parser.add_argument("dst", nargs="?", help="the .beton file to write")
    add_options(parser, ConvertOptions)
    given = vars(parser.parse_args(argv))
    options = fill(ConvertOptions, given)

    def act() -> int:
        if given["dst"] is not None:
            print("\n".join(convert(given["src"], given["dst"], options).lines()))
            return 0
        if not options.verify:
            raise ValueError("DST is missing: give the .beton file to write, or --verify")
        options.check()
        faults, good = verify_existing(given["src"], options.workers)
        print("\n".join(faults) or good)
        return 1 if faults else 0

    return run_command(act, writes=given["dst"] is not None)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers are the parallelism
    sys.exit(main())
