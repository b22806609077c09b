"""Photos a second into a .beton: this project's converter against FFCV's own DatasetWriter.

    python benchmarks/convert.py --data photos/ [--photos 2000] [--rounds 7] [--json FILE]

Both get the same color JPEGs, which need no encoding, and one worker. FFCV's writer gets them as
its documentation has it, from Pillow images: with its default settings it stores pixels, with
`write_mode="jpg"` it encodes anew. Ours keeps their bytes, lists its source, starts its worker anew
and waits until the disk has the file, all of which is timed; FFCV's does none of it. The floor is a
plain copy of the same bytes into one file, flushed to disk as ours is. The sides take turns. At the
end counts, labels and decoded pixels of the files are compared.

Without --data the photos are drawn (small ones: `benchmarks/synthetic/photos.py`). A few files
stand for many: they are repeated, under other names, up to --photos. With --dst in /dev/shm no disk
counts.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ibeton.benchmarks.harness import measure as harness
from ibeton.benchmarks.harness.measure import spread
from ibeton.benchmarks.synthetic.photos import SyntheticOptions, make_photos
from ibeton.command import run_or_exit
from ibeton.pipeline.convert import ConvertOptions, convert
from ibeton.pipeline.store.beton import BetonReader
from ibeton.pipeline.store.jpeg import whole_jpeg_size
from ibeton.pipeline.store.sources import Photo, open_source, read_bytes
from ibeton.progress import plain_console

OURS, RAW, JPG, COPY = "ibeton, keep", "FFCV, raw (default)", "FFCV, jpg", "copy (floor)"


class PillowPhotos:
    """The data set that FFCV's writer gets: (Pillow image, label), decoded when asked for."""

    def __init__(self, photos: list[Photo]) -> None:
        self._photos = photos

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        photo = self._photos[index]
        return Image.open(os.path.join(photo.path, photo.name)).convert("RGB"), photo.label


def repeated(data: Path, folder: Path, count: int) -> list[Photo]:
    """`count` links in `folder` to the color JPEGs of the folder `data`, classes as there."""
    kept = [p for p in open_source(data).photos if whole_jpeg_size(read_bytes(p))]
    if not kept:
        raise SystemExit(f"error: --data {data} holds no whole color JPEG")
    for i in range(count):
        photo = kept[i % len(kept)]
        name = Path(photo.name)
        link = folder / name.parent / f"{name.stem}_{i // len(kept)}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.join(photo.path, photo.name))
    return open_source(folder).photos


def write_ffcv(photos: list[Photo], dst: Path, **settings: str) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(**settings), "label": IntField()}
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # its progress bar
        DatasetWriter(str(dst), fields, num_workers=1).from_indexed_dataset(PillowPhotos(photos))


def copy(photos: list[Photo], dst: Path) -> None:
    with open(dst, "wb") as file:
        for photo in photos:
            file.write(read_bytes(photo))
        file.flush()
        os.fsync(file.fileno())


def seconds(work: Callable[[Path], Any], dst: Path) -> float:
    """What it takes to write `dst` anew."""
    dst.unlink(missing_ok=True)
    os.sync()  # what others wrote
    start = time.perf_counter()
    work(dst)
    return time.perf_counter() - start


def compare(files: dict[str, Path]) -> str:
    """Whether the files hold the same samples; SystemExit where they do not."""
    readers = {name: BetonReader(file) for name, file in files.items() if name != COPY}
    ours, distances = readers[OURS], []
    for name, theirs in readers.items():
        if len(theirs) != len(ours) or not np.array_equal(theirs.labels, ours.labels):
            raise SystemExit(f"error: {name} has other photos or labels than {OURS}")
    for i in np.linspace(0, len(ours) - 1, min(300, len(ours))).astype(int):
        pixels = ours.pixels(i)
        if not np.array_equal(readers[RAW].pixels(i), pixels):
            raise SystemExit(f"error: photo {i} has other pixels in {RAW} than in {OURS}")
        distances.append(np.abs(readers[JPG].pixels(i).astype(int) - pixels).mean())
    return (
        f"same {len(ours):,} photos and labels in all; of {len(distances)} photos the pixels of"
        f" {RAW} are equal, those of {JPG} are {np.mean(distances):.2f} of 255 away (encoded twice)"
    )


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=7)
    photos = harness.integer(1)
    parser.add_argument("--data", type=Path, help="folder of photos (default: drawn ones)")
    parser.add_argument("--photos", type=photos, default=2000, help="per round, files repeated")
    parser.add_argument("--dst", type=Path, help="folder to write to (default: a temporary one)")
    args = parser.parse_args()
    try:
        import ffcv.writer  # noqa: F401
    except ImportError as error:
        sys.exit(f"error: there is no ffcv to compare with ({error}): make ffcv")
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=args.dst) as room:
        run(args, Path(room))


def run(args: argparse.Namespace, room: Path) -> None:
    data, source = args.data, room / "photos"
    if data is None:
        make_photos(room / "drawn", SyntheticOptions(images_per_class=30, val_per_class=1))
        data = room / "drawn" / "train"
    photos = repeated(data.resolve(), source, args.photos)
    sides: dict[str, Callable[[Path], Any]] = {
        COPY: lambda dst: copy(photos, dst),
        OURS: lambda dst: convert(source, dst, ConvertOptions(workers=1)),
        RAW: lambda dst: write_ffcv(photos, dst),
        JPG: lambda dst: write_ffcv(photos, dst, write_mode="jpg"),
    }
    files = {name: room / f"{i}.beton" for i, name in enumerate(sides)}
    steps = {name: partial(seconds, work, files[name]) for name, work in sides.items()}
    times = harness.in_turns(steps, args.rounds)
    stored = {name: file.stat().st_size / 1e6 for name, file in files.items()}
    given = sum(os.stat(os.path.join(p.path, p.name)).st_size for p in photos) / 1e6
    headings = ("photos/s", "MB/s of JPEG", "ours is faster by", "file MB")
    title = f"{len(photos):,} photos, {given:.1f} MB, one worker, written to {room.parent}"
    table = harness.figures("", *headings, title=title)
    for name, took in times.items():
        rates = ([amount / t for t in took] for amount in (len(photos), given))
        faster = harness.ratios(times, name, OURS)
        table.add_row(name, *map(spread, rates), spread(faster), f"{stored[name]:,.0f}")
    console = plain_console(width=110)
    console.print(table)
    console.print(compare(files))
    results = {"photos": len(photos), "megabytes": given, "file_megabytes": stored}
    about = harness.machine("ffcv", "pillow", "numpy")
    harness.conclude(console, about, args.rounds, args.json, seconds=times, **results)


if __name__ == "__main__":
    run_or_exit(main)
