"""Does feature extraction run as fast as the slower of its two halves, decoding and the network?

    python benchmarks/evaluation/features.py --data photos.beton --arch vit_s
    python benchmarks/evaluation/features.py --embed-dim 96 --depth 4 --num-heads 3

In rounds that take turns: views decoded by `--workers` threads and thrown away; the network on
views in memory, by `--threads` threads of a CPU or on a GPU; and both together, as all frozen
evaluations run them. On a CPU give each half the cores that it has in the whole: one and one of
two. The aim is 0.9 of the slower half. On a machine that others use too the whole may not get the
cores that both halves need; CPU time tells what it would cost on one of its own: both halves' over
the whole's says what putting them together adds.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from ibeton.benchmarks.harness.measure import in_words, machine, quartiles, spread, take_turns
from ibeton.benchmarks.synthetic.dataset import synthetic_beton
from ibeton.command import run_or_exit
from ibeton.evaluation.frozen.features import (
    Extraction,
    feature_batches,
    normalized,
    tokens_of,
)
from ibeton.evaluation.photos import PhotoSet, view_batches
from ibeton.evaluation.trainable import PRECISIONS
from ibeton.model.config import ModelConfig
from ibeton.model.ibot import build_network
from ibeton.options import add_options, fill
from ibeton.progress import plain_console

NAMES = ("blocks", "cls", "parts", "patch_mean", "prototype")  # what evaluation.all asks for
LOADER, FORWARD, WHOLE = "decoding alone", "network alone", "extraction"


def measure(
    data: str, config: ModelConfig, how: Extraction, images: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Images/s of the halves and of the whole, one figure a round, and CPU milliseconds an
    image."""
    photos = PhotoSet(data, config.image_size)
    network = build_network(config, is_student=False).eval().to(how.device)
    order = np.arange(images) % len(photos)
    pinned = torch.device(how.device).type == "cuda"
    ready = list(view_batches(photos, order[: 2 * how.batch_size], how.batch_size, pinned=pinned))

    def decode() -> int:
        batches = view_batches(photos, order, how.batch_size, how.threads, pinned=pinned)
        return sum(len(batch.indices) for batch in batches)

    def forward() -> int:
        done = 0
        for batch in itertools.cycle(ready):
            with torch.inference_mode(), how.autocast():
                found = tokens_of(
                    network.backbone, network.head, normalized(batch.images, how.device), NAMES
                )
            done += len(batch.images)
            if done >= images:
                break
        found["cls"].cpu()  # waits for the device
        return done

    def whole() -> int:
        batches = feature_batches(network.backbone, photos, NAMES, order, how, network.head)
        return sum(len(indices) for indices, _ in batches)

    return on_two_clocks({LOADER: decode, FORWARD: forward, WHOLE: whole}, rounds)


def on_two_clocks(
    sides: dict[str, Callable[[], int]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """`take_turns`, and CPU milliseconds an item of all threads, one figure a round."""
    cpu: dict[str, list[float]] = {name: [] for name in sides}

    def timed(name: str) -> int:
        start = time.process_time()
        done = sides[name]()
        cpu[name].append(1e3 * (time.process_time() - start) / done)
        return done

    rates = take_turns({name: partial(timed, name) for name in sides}, rounds)
    return rates, {name: spent[1:] for name, spent in cpu.items()}  # the first is not timed


def shares(rates: dict[str, list[float]]) -> list[float]:
    """Round by round, the whole over its slower half."""
    halves = zip(rates[LOADER], rates[FORWARD], strict=True)
    return [whole / min(pair) for whole, pair in zip(rates[WHOLE], halves, strict=True)]


def without_waiting(cpu: dict[str, list[float]]) -> list[float]:
    """Round by round, the CPU time of both halves over that of the whole: 1 if nothing is added."""
    of = (cpu[name] for name in (LOADER, FORWARD, WHOLE))
    return [(loader + forward) / whole for loader, forward, whole in zip(*of, strict=True)]


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """The photos, the network and the machine; for benchmarks/evaluation/linear.py too."""
    parser.add_argument("--data", help=".beton, folder or tar (default: photos drawn for it)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that each side has")
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time")
    parser.add_argument("--workers", type=int, default=1, help="threads that decode")
    parser.add_argument("--threads", type=int, default=1, help="other threads, on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    add_options(parser, ModelConfig)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--images", type=int, default=256, help="images a round")
    add_shared_options(parser)
    args = parser.parse_args()
    if args.rounds < 2 or args.images < args.batch_size:
        parser.error("--rounds must be at least 2 and --images at least --batch-size")
    torch.set_num_threads(args.threads)
    config = fill(ModelConfig, vars(args))
    how = Extraction(args.device, args.batch_size, args.workers, args.precision)
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or synthetic_beton(Path(folder))
        rates, cpu = measure(data, config, how, args.images, args.rounds)
    about, console = machine("torch", "pillow"), plain_console(width=100)
    table = Table(title=f"images/s, {config.arch} at {config.image_size} pixels, {args.device}")
    table.add_column("")
    table.add_column("images/s", justify="right")
    table.add_column("CPU ms an image", justify="right")
    for name, values in rates.items():
        table.add_row(name, spread(values), spread(cpu[name]))
    table.add_row("extraction over the slower half", spread(shares(rates), 2))
    table.add_row("both halves over extraction", "", spread(without_waiting(cpu), 2))
    console.print(table)
    console.print(
        f"{args.workers} decoding threads, {args.threads} of the network; {in_words(about)};"
        f" medians (quartiles) of {args.rounds} rounds, taken in turns"
    )
    if args.json:
        middle = quartiles(shares(rates))[0]
        content = {
            "machine": about,
            "images_per_s": rates,
            "cpu_ms": cpu,
            "share_of_slower": middle,
            "share_of_cpu": quartiles(without_waiting(cpu))[0],
        }
        args.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    run_or_exit(main)
