"""How fast do training views of fine-tuning come, beside timm's loader with the same recipe?

    python benchmarks/evaluation/finetune.py --data imagenet/train --workers 8
    python benchmarks/evaluation/finetune.py --data imagenet/train --repeats 3

In rounds that take turns, both sides make an epoch of normalized, erased and mixed images with soft
targets from the same photos: timm's `create_loader` from class folders in worker processes with
`Mixup`, and the loader of `ibeton finetune` from a .beton in threads. The augmentation is
rand-m9-inc1: with a drawn strength (mstd), timm's posterize sometimes asks Pillow 13 for 0 bits,
which is an error. On a machine that others use too, CPU milliseconds per view of all threads and
processes say more than views/s.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.table import Table

from ibeton.benchmarks.harness.measure import (
    in_words,
    machine,
    quartiles,
    ratios,
    spread,
    take_turns,
)
from ibeton.command import run_or_exit
from ibeton.evaluation.finetune.config import FinetuneConfig
from ibeton.evaluation.finetune.loader import Loader, ViewSettings
from ibeton.evaluation.finetune.sets import open_labeled
from ibeton.evaluation.finetune.steps import Mixer
from ibeton.pipeline.convert import convert
from ibeton.progress import plain_console

OURS, TIMM = "ibeton", "timm"
AUGMENT = "rand-m9-inc1"


def our_side(data: Path, args: argparse.Namespace) -> Callable[[], int]:
    """A function that makes an epoch of batches and counts its views."""
    beton = str(data.with_suffix(".beton"))
    convert(data, beton)
    photos = open_labeled(beton, beton).train
    settings = ViewSettings(args.image_size, augment=AUGMENT, repeats=args.repeats)
    loader = Loader(photos, settings, args.batch_size, threads=args.workers)
    config = FinetuneConfig(mix_images=args.batch_size)
    mixer, epochs = Mixer(config, len(photos.classes), torch.device("cpu")), itertools.count()

    def make() -> int:
        for step, batch in enumerate(loader.epoch(next(epochs))):
            mixer(batch.images, batch.labels, step, 0)
        return loader.steps_per_epoch * args.batch_size

    return make


def timm_side(data: Path, args: argparse.Namespace) -> Callable[[], int]:
    """The same by timm."""
    from timm.data import Mixup, create_dataset, create_loader

    dataset = create_dataset("", str(data))
    loader = create_loader(
        dataset,
        (3, args.image_size, args.image_size),
        args.batch_size,
        is_training=True,
        use_prefetcher=False,
        re_prob=0.25,
        re_mode="pixel",
        auto_augment=AUGMENT,
        color_jitter=0.0,
        interpolation="bicubic",
        num_workers=args.workers,
        persistent_workers=True,
        device=torch.device("cpu"),
    )
    mix = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=len(dataset.reader.class_to_idx))

    def make() -> int:
        for images, labels in loader:
            mix(images, labels)
        return len(loader) * args.batch_size

    return make


def cpu_seconds() -> float:
    """CPU time so far of this process, its threads, and worker processes that live."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def measure(data: Path, args: argparse.Namespace) -> tuple[dict[str, list[float]], ...]:
    """Views/s and CPU milliseconds per view of both sides, one figure per round."""
    cpu: dict[str, list[float]] = {OURS: [], TIMM: []}

    def timed(name: str, make: Callable[[], int]) -> int:
        start = cpu_seconds()
        views = make()
        cpu[name].append(1000 * (cpu_seconds() - start) / views)
        return views

    sides = {OURS: our_side(data, args), TIMM: timm_side(data, args)}
    rates = take_turns(
        {name: partial(timed, name, make) for name, make in sides.items()}, args.rounds
    )
    return rates, {name: spent[1:] for name, spent in cpu.items()}  # the first is not timed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--data", help="class folders (default: photos drawn for it)")
    add("--image-size", type=int, default=224, help="side of a view in pixels")
    add("--batch-size", type=int, default=64, help="views per batch")
    add("--batches", type=int, default=8, help="batches per round")
    add("--workers", type=int, default=1, help="threads (ibeton) and processes (timm)")
    add("--repeats", type=int, default=1, help="views of a photo in a batch (ibeton's side alone)")
    add("--rounds", type=int, default=5, help="rounds that each side has")
    add("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    if min(args.workers, args.batches, args.repeats) < 1 or args.rounds < 2 or args.batch_size % 2:
        parser.error("--rounds must be at least 2, --batch-size even, and the others at least 1")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(args.data) if args.data else _drawn(Path(folder))
        rates, cpu = measure(_links(data, Path(folder), args), args)
    console = plain_console(width=100)
    table = Table(title=f"training views of {args.image_size} pixels, {args.workers} worker(s)")
    for heading in ("", "views/s", "CPU ms per view"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, values in rates.items():
        table.add_row(name, spread(values), spread(cpu[name]))
    faster = ratios(rates, OURS, TIMM)
    cheaper = [theirs / ours for ours, theirs in zip(cpu[OURS], cpu[TIMM], strict=True)]
    table.add_row("timm over ibeton in time", spread(faster), spread(cheaper))
    console.print(table)
    about = machine("torch", "timm", "pillow", "numba")
    console.print(f"{in_words(about)}; medians (quartiles) of {args.rounds} rounds, taken in turns")
    if args.json:
        found = {"views_per_s": rates, "cpu_ms": cpu, "ratio": quartiles(faster)[0]}
        found |= {"cpu_ratio": quartiles(cheaper)[0], "machine": about}
        args.json.write_text(json.dumps(found, indent=1))


def _links(data: Path, folder: Path, args: argparse.Namespace) -> Path:
    """Class folders of links to as many photos as an epoch has, spread over the whole set."""
    photos = sorted(path for path in data.glob("*/*") if path.is_file())
    count = args.batches * args.batch_size
    if len(photos) < count:
        raise SystemExit(
            f"error: {data} has {len(photos)} photos, fewer than the {count} of a round"
        )
    for path in photos[:: len(photos) // count][:count]:
        link = folder / "photos" / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    return folder / "photos"


def _drawn(folder: Path) -> Path:
    """Class folders of drawn photos."""
    from ibeton.benchmarks.synthetic.photos import SyntheticOptions, make_photos

    make_photos(folder, SyntheticOptions(images_per_class=60, val_per_class=1))
    return folder / "train"


if __name__ == "__main__":
    run_or_exit(main)
