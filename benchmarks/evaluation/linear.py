"""What do all learning rates of linear probing cost beside one?

    python benchmarks/evaluation/linear.py --data clothing10/train --embed-dim 96 \\
        --depth 4 --num-heads 3 --image-size 64
    python benchmarks/evaluation/linear.py --arch vit_s

In rounds that take turns, for one rate and for the 45 published ones: linear layers on stored
features; with the features computed once before, as `evaluation.frozen.linear` does; and with
features of new views every epoch, the published way (`--augmented`). Beside them one layer by
PyTorch's own parts, which the tests hold every rate against. The aim is to stay under twice one
rate from photos to scores. The layers alone cannot: 45 rates are 45 times the arithmetic. CPU
seconds count all threads; on a busy machine they are what the work would cost alone.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from ibeton.benchmarks.evaluation.features import add_shared_options, on_two_clocks
from ibeton.benchmarks.harness.measure import in_words, machine, quartiles, spread
from ibeton.benchmarks.synthetic.dataset import synthetic_beton
from ibeton.command import run_or_exit
from ibeton.evaluation.frozen.features import Extraction, extract
from ibeton.evaluation.frozen.heads import RATES, LinearSettings, train_head_reference, train_heads
from ibeton.evaluation.frozen.linear import augmented, feature_names, joined, shuffled
from ibeton.evaluation.photos import PhotoSet
from ibeton.model.config import ModelConfig
from ibeton.model.ibot import build_network
from ibeton.options import fill
from ibeton.progress import plain_console

MIDDLE = 22  # of the rates, the one that is trained alone
FEATURES, STOCK = "features alone", "one rate, PyTorch's parts"
ONE, ALL = "one rate", "all rates"
ONE_STREAMED, ALL_STREAMED = "one rate, new views", "all rates, new views"
Times = dict[str, list[float]]  # seconds by side, one figure a round


def measure(
    photos: PhotoSet, config: ModelConfig, how: Extraction, epochs: tuple[int, int], rounds: int
) -> tuple[Times, Times]:
    """Seconds and CPU seconds. `epochs`: of layers on stored features, and on new views."""
    network = build_network(config, is_student=False).eval().to(how.device)
    names = feature_names({"arch": config.arch})
    found = extract(network.backbone, photos, names, how)
    train = joined(found.arrays, names)
    val = train[::10], found.labels[::10], photos.num_classes

    def layers(train_one: Callable[..., object], rates: tuple[float, ...], new_views: bool) -> int:
        settings = LinearSettings(epochs[new_views], rates=rates)
        if new_views:
            batches = augmented(network.backbone, photos, names, how, settings)
        else:
            batches = shuffled(train, found.labels, settings)
        train_one(batches, *val, settings, how.device)
        return 1

    one = (RATES[MIDDLE],)
    rates, cpu = on_two_clocks(
        {
            FEATURES: lambda: bool(extract(network.backbone, photos, names, how)),
            STOCK: lambda: layers(train_head_reference, one, False),
            ONE: lambda: layers(train_heads, one, False),
            ALL: lambda: layers(train_heads, RATES, False),
            ONE_STREAMED: lambda: layers(train_heads, one, True),
            ALL_STREAMED: lambda: layers(train_heads, RATES, True),
        },
        rounds,
    )
    seconds = {name: [1 / rate for rate in values] for name, values in rates.items()}
    return seconds, {name: [ms / 1e3 for ms in values] for name, values in cpu.items()}


def ratios(times: Times) -> Times:
    """Round by round, what all rates cost as a multiple of what one costs."""
    of = {name: np.array(values) for name, values in times.items()}
    found = {
        "layers alone": of[ALL] / of[ONE],
        "layers alone, over PyTorch's parts": of[ALL] / of[STOCK],
        "features computed once": (of[FEATURES] + of[ALL]) / (of[FEATURES] + of[ONE]),
        "new views every epoch": of[ALL_STREAMED] / of[ONE_STREAMED],
    }
    return {f"all over one, {name}": values.tolist() for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--sgd-epochs", type=int, default=100, help="on stored features")
    parser.add_argument("--streamed-epochs", type=int, default=1, help="on new views")
    add_shared_options(parser)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    torch.set_num_threads(args.threads)
    config = fill(ModelConfig, vars(args))
    how = Extraction(args.device, args.batch_size, args.workers, args.precision)
    epochs = (args.sgd_epochs, args.streamed_epochs)
    with tempfile.TemporaryDirectory() as folder:
        photos = PhotoSet(args.data or synthetic_beton(Path(folder)), config.image_size)
        seconds, cpu = measure(photos, config, how, epochs, args.rounds)
    table = Table(title=f"{len(RATES)} learning rates, {len(photos)} photos, {args.device}")
    for heading in ("", "seconds", "CPU seconds"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, values in seconds.items():
        table.add_row(name, spread(values), spread(cpu[name]))
    table.add_section()
    for name, values in ratios(seconds).items():
        table.add_row(name, spread(values), spread(ratios(cpu)[name]))
    about, console = machine("torch", "numpy"), plain_console(width=100)
    console.print(table)
    console.print(
        f"{config.arch} at {config.image_size} pixels, {epochs[0]} epochs on stored features,"
        f" {epochs[1]} on new views; {args.workers} decoding threads, {args.threads} of the rest;"
        f" {in_words(about)}; medians (quartiles) of {args.rounds} rounds, taken in turns"
    )
    if args.json:
        middle = {name: quartiles(values)[0] for name, values in ratios(cpu).items()}
        content = {"machine": about, "seconds": seconds, "cpu_s": cpu, "cpu_ratios": middle}
        args.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    run_or_exit(main)
