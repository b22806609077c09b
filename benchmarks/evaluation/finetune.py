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
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ibeton.benchmarks.harness import measure as harness
from ibeton.benchmarks.harness.measure import quartiles, ratios, spread
from ibeton.benchmarks.synthetic.photos import SyntheticOptions, make_photos
from ibeton.command import amount, run_or_exit
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


def main() -> None:
    parser, count = harness.make_parser(__doc__), harness.integer(1)
    add = parser.add_argument
    add("--data", help="class folders (default: photos drawn for it)")
    add("--image-size", type=count, default=224, help="side of a view in pixels")
    add("--batch-size", type=count, default=64, help="views per batch")
    add("--batches", type=count, default=8, help="batches per round")
    add("--workers", type=count, default=1, help="threads (ibeton) and processes (timm)")
    add("--repeats", type=count, default=1, help="views of a photo in a batch (ibeton)")
    args = parser.parse_args()
    if args.batch_size % 2:
        parser.error("--batch-size must be even")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(args.data or folder)
        if not args.data:
            make_photos(data, SyntheticOptions(images_per_class=60, val_per_class=1))
            data = data / "train"
        data = _links(data, Path(folder), args)
        sides = {OURS: our_side(data, args), TIMM: timm_side(data, args)}
        rates, cpu = harness.on_two_clocks(sides, args.rounds, cpu_seconds)
    console = plain_console(width=100)
    table = harness.figures("", "views/s", "CPU ms per view", title=title(args))
    for name, values in rates.items():
        table.add_row(name, spread(values), spread(cpu[name]))
    faster, cheaper = ratios(rates, OURS, TIMM), ratios(cpu, TIMM, OURS)
    table.add_row("timm over ibeton in time", spread(faster), spread(cheaper))
    console.print(table)
    about = harness.machine("torch", "timm", "pillow", "numba")
    found = {"views_per_s": rates, "cpu_ms": cpu, "ratio": quartiles(faster)[0]}
    found["cpu_ratio"] = quartiles(cheaper)[0]
    harness.conclude(console, about, args.rounds, args.json, **found)


def title(args: argparse.Namespace) -> str:
    share = f"; ibeton decodes 1/{args.repeats} of the photos" if args.repeats > 1 else ""
    return f"training views of {args.image_size} pixels, {amount(args.workers, 'worker')}{share}"


def _links(data: Path, folder: Path, args: argparse.Namespace) -> Path:
    """Class folders of links to as many photos as an epoch has, spread over the whole set."""
    photos = sorted(path for path in data.glob("*/*") if path.is_file())
    count = args.batches * args.batch_size
    if len(photos) < count:
        raise SystemExit(
            f"error: {data} has {len(photos)} photos, fewer than the {count} of a round"
        )
    for path in (photos[i] for i in np.linspace(0, len(photos) - 1, count).astype(int)):
        link = folder / "photos" / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    return folder / "photos"


if __name__ == "__main__":
    run_or_exit(main)
