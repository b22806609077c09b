"""Croppers on the GPU: images/s, their share of the model's step, and what hides behind it.

    python benchmarks/crops_gpu.py                          # drawn photos, ViT-S/16, fp16
    python benchmarks/crops_gpu.py --data photos.beton --batch-size 128
    python benchmarks/crops_gpu.py --interpreted            # without a GPU: that it runs, no speed

Photos are decoded once and lie in pinned memory, so that no decoder can be the limit. One round is:
the copy alone, the cropper alone on pixels that are there, the feed (copy and crop, a batch ahead
and on a stream of its own), the step alone on a batch that is there, and steps that take their
batches from the feed. What these take less than feed and step one after the other is hidden.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

if "--interpreted" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is loaded

import numpy as np
import torch
from rich.console import Console

from ibeton.benchmarks.harness import measure as harness
from ibeton.benchmarks.harness.measure import quartiles, spread, take_turns
from ibeton.benchmarks.harness.model_step import new_step, now
from ibeton.benchmarks.synthetic.dataset import synthetic_beton
from ibeton.command import run_or_exit
from ibeton.model import ModelConfig
from ibeton.model.cuda_graph import GraphedStep
from ibeton.pipeline import PipelineConfig
from ibeton.pipeline.batch import BatchPlan, Decoded, DeviceCrops
from ibeton.pipeline.loaders.context import context_of
from ibeton.pipeline.loaders.gpu_stream import GpuCrops
from ibeton.pipeline.sampling.draws import draw_batch, spec_table
from ibeton.pipeline.sampling.masks import MaskConfig, draw_masks
from ibeton.pipeline.store.beton import BetonReader
from ibeton.progress import plain_console
from ibeton.training.precision import DTYPES

STEPS = 8  # of a turn
SMALL_VIEWS: dict[str, Any] = {
    **{"global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 2, "patch_size": 16}
}
SMALL_MODEL: dict[str, Any] = {
    **{"embed_dim": 32, "depth": 1, "num_heads": 2},
    **{"hidden_dim": 32, "bottleneck_dim": 16, "out_dim": 64},
}


class StoredPhotos:
    """One decoded batch in pinned memory, handed out as often as asked: a decoder without cost."""

    def __init__(self, reader: BetonReader, count: int, pinned: bool) -> None:
        photos = [reader.pixels(i % len(reader)) for i in range(count)]
        sizes = np.array([photo.nbytes for photo in photos])
        pixels = torch.from_numpy(np.concatenate([photo.reshape(-1) for photo in photos]))
        self.decoded = Decoded(
            parts=[pixels.pin_memory() if pinned else pixels],
            offsets=np.cumsum(sizes) - sizes,
            heights=np.array([photo.shape[0] for photo in photos]),
            widths=np.array([photo.shape[1] for photo in photos]),
            indices=torch.arange(count),
        )

    def stream(
        self, plans: Iterator[BatchPlan]
    ) -> Generator[tuple[BatchPlan, Decoded], None, None]:
        for plan in plans:
            yield plan, self.decoded

    def close(self) -> None:
        pass


class Bench:
    """The sides of one round; each gives the batches that it made."""

    def __init__(self, args: argparse.Namespace, data: str) -> None:
        self.device = torch.device("cpu" if args.interpreted else "cuda")
        self.steps = 1 if args.interpreted else STEPS
        self.config = PipelineConfig(data=(data,), **SMALL_VIEWS if args.interpreted else {})
        reader = BetonReader(data)
        self.source = StoredPhotos(reader, args.batch_size, pinned=not args.interpreted)
        self.feed = GpuCrops(context_of(self.config, reader, self.device), self.source)
        self.indices = np.arange(args.batch_size)
        self.resident = self.source.decoded.parts[0].to(self.device)
        _, self.crops = next(self.feed.stream(iter([BatchPlan(0, self.indices)])))
        config = self.config
        model = ModelConfig(
            arch=args.arch,
            patch_size=config.patch_size,
            image_size=config.global_crops_size,
            local_crops_number=config.local_crops_number,
            **SMALL_MODEL if args.interpreted else {},
        )
        self.graphed = GraphedStep(new_step(model, self.device.type, DTYPES[args.precision]))
        cells = config.global_crops_size // config.patch_size
        shape = config.global_crops_number, (cells, cells)
        self.masks = torch.from_numpy(draw_masks(MaskConfig(), 0, 0, self.indices, *shape))

    def step(self, crops: DeviceCrops) -> None:
        rates = {"lr": 1e-5, "weight_decay": 0.04, "momentum": 0.996}
        self.graphed(crops.global_crops, crops.local_crops, self.masks, epoch=1, **rates)

    def copy(self) -> int:
        for _ in range(self.steps):
            self.source.decoded.parts[0].to(self.device, non_blocking=True)
        return self.steps

    def cut(self) -> int:
        photos, specs = self.source.decoded, spec_table(self.config.views())
        shapes = photos.heights, photos.widths
        for number in range(self.steps):
            draws = draw_batch(specs, self.config.seed, number, self.indices, *shapes)
            self.feed.cropper.cut(self.resident, photos.offsets, *shapes, draws)
        return self.steps

    def fed(self) -> Iterator[DeviceCrops]:
        plans = iter([BatchPlan(1, self.indices)] * self.steps)
        return (crops for _, crops in self.feed.stream(plans))

    def step_alone(self) -> int:
        for _ in range(self.steps):
            self.step(self.crops)
        return self.steps

    def both(self) -> int:
        for crops in self.fed():
            self.step(crops)
        return self.steps

    def sides(self) -> dict[str, Callable[[], int]]:
        return {
            "copy alone": self.copy,
            "crops alone": self.cut,
            "feed alone (copy + crops)": lambda: sum(1 for _ in self.fed()),
            "step alone": self.step_alone,
            "steps from the feed": self.both,
        }


def report(times: dict[str, list[float]], batch: int, gigabytes: float, console: Console) -> None:
    title = f"croppers on the GPU, batch {batch}"
    table = harness.figures("", "ms per batch", "images/s", title=title)
    for name, values in times.items():
        rates = [batch / value for value in values]
        table.add_row(name, spread([1e3 * value for value in values]), spread(rates))
    console.print(table)
    middle = {name: quartiles(values)[0] for name, values in times.items()}
    crops, feed = middle["crops alone"], middle["feed alone (copy + crops)"]
    step, both = middle["step alone"], middle["steps from the feed"]
    console.print(
        f"crops take {crops / step:.1%} of a step; copies run at"
        f" {gigabytes / middle['copy alone']:.1f} GB/s; {(feed + step - both) / feed:.0%} of the"
        f" feed is hidden behind the step, which becomes {both / step - 1:.1%} longer"
    )


def arguments() -> argparse.Namespace:
    parser = harness.make_parser(__doc__)
    parser.add_argument("--data", help=".beton file (default: photos drawn for the purpose)")
    parser.add_argument("--arch", default="vit_s")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp16")
    parser.add_argument(
        "--interpreted", action="store_true", help="on the CPU, by Triton's interpreter, tiny model"
    )
    args = parser.parse_args()
    if args.interpreted:
        args.batch_size, args.precision = 2, "fp32"
    elif not torch.cuda.is_available():
        parser.error("no CUDA device is usable here; --interpreted shows that all of it runs")
    return args


def main() -> None:
    args = arguments()
    if args.interpreted:
        from ibeton.benchmarks.harness.interpreter import adapt_interpreter

        adapt_interpreter()
    console = plain_console(width=100)
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or synthetic_beton(Path(folder), 1 if args.interpreted else 12)
        bench = Bench(args, data)
        rates = take_turns(bench.sides(), args.rounds, partial(now, bench.device.type))
    times = {name: [1 / rate for rate in values] for name, values in rates.items()}
    report(times, args.batch_size, bench.source.decoded.parts[0].numel() / 1e9, console)
    if args.interpreted:
        console.print("by Triton's interpreter: these times say nothing about a GPU")
    settings = {**vars(args), "json": None}
    about = harness.machine("torch", "triton", device=bench.device.type)
    results = {"settings": settings, "seconds_a_batch": times}
    harness.conclude(console, about, args.rounds, args.json, **results)


if __name__ == "__main__":
    run_or_exit(main)
