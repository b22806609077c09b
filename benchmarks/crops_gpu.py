"""Croppers on the GPU: images/s, their share of the model's step, and what hides behind it.

    python benchmarks/crops_gpu.py                          # drawn photos, ViT-S/16, fp16
    python benchmarks/crops_gpu.py --data photos.beton --batch-size 128
    python benchmarks/crops_gpu.py --interpreted            # without a GPU: that it runs, no speed

Photos are decoded once and lie in pinned memory, so that no decoder can be the limit. One round is:
the copy alone, the cropper alone on pixels that are there, the feed (copy and crop, a batch ahead
and on a stream of its own), the step alone on a batch that is there, and steps that take their
batches from the feed. What these take less than feed and step one after the other is hidden.
nvJPEG (torchvision's decoder on the device) is measured on the same photos.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

if "--interpreted" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is loaded

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ibeton.benchmarks.harness.measure import in_words, machine, quartiles, spread
from ibeton.benchmarks.synthetic.dataset import synthetic_beton
from ibeton.command import run_or_exit
from ibeton.model import ModelConfig, build, training_step
from ibeton.model.optim import build_optimizer
from ibeton.pipeline import PipelineConfig
from ibeton.pipeline.batch import BatchPlan, Decoded, DeviceCrops
from ibeton.pipeline.loaders.context import context_of
from ibeton.pipeline.loaders.gpu_stream import GpuCrops
from ibeton.pipeline.sampling import MaskConfig, draw_batch, draw_masks, spec_table
from ibeton.pipeline.store import BetonReader
from ibeton.progress import plain_console

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = 8  # of a turn


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
    """The sides of one round; each gives the seconds of a batch."""

    def __init__(self, args: argparse.Namespace, data: str) -> None:
        self.device = torch.device("cpu" if args.interpreted else "cuda")
        self.config = PipelineConfig(data=(data,), **SMALL_VIEWS if args.interpreted else {})
        config, on_gpu = self.config, not args.interpreted
        self.dtype = DTYPES[args.precision]
        self.steps = 1 if args.interpreted else STEPS
        self.reader = BetonReader(data)
        self.source = StoredPhotos(self.reader, args.batch_size, pinned=on_gpu)
        self.feed = GpuCrops(context_of(config, self.reader, self.device), self.source)
        self.cropper = self.feed.cropper
        self.indices = np.arange(args.batch_size)
        self.model(args.arch)
        self.resident = self.source.decoded.parts[0].to(self.device)

    def model(self, arch: str) -> None:
        config = self.config
        torch.manual_seed(0)
        settings = ModelConfig(
            arch=arch,
            patch_size=config.patch_size,
            image_size=config.global_crops_size,
            local_crops_number=config.local_crops_number,
        )
        self.ibot = build(settings).to(self.device)
        self.optimizer = build_optimizer(self.ibot.student)
        half = self.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type) if half else None
        cells = config.global_crops_size // config.patch_size
        views = config.global_crops_number
        indices = np.arange(len(self.source.decoded.offsets))
        self.masks = torch.from_numpy(
            draw_masks(MaskConfig(), 0, 0, indices, views, (cells, cells))
        )
        _, self.crops = next(self.feed.stream(iter([BatchPlan(0, self.indices)])))

    def step(self, crops: DeviceCrops) -> None:
        training_step(
            self.ibot,
            self.optimizer,
            self.scaler,
            crops.global_crops,
            crops.local_crops,
            self.masks,
            epoch=1,
            lr=1e-5,
            weight_decay=0.04,
            momentum=0.996,
            autocast_dtype=self.dtype,
        )

    def copy(self) -> None:
        for _ in range(self.steps):
            self.source.decoded.parts[0].to(self.device, non_blocking=True)

    def cut(self) -> None:
        config, photos = self.config, self.source.decoded
        for number in range(self.steps):
            shapes = photos.heights, photos.widths
            draws = draw_batch(
                spec_table(config.views()), config.seed, number, self.indices, *shapes
            )
            self.cropper.cut(self.resident, photos.offsets, *shapes, draws)

    def feed_alone(self) -> None:
        for _ in self.fed():
            pass

    def fed(self) -> Iterator[DeviceCrops]:
        plans = iter([BatchPlan(1, self.indices)] * self.steps)
        return (crops for _, crops in self.feed.stream(plans))

    def step_alone(self) -> None:
        for _ in range(self.steps):
            self.step(self.crops)

    def both(self) -> None:
        for crops in self.fed():
            self.step(crops)

    def nvjpeg(self) -> None:
        """All photos of the batch by nvJPEG; the first error says what is missing."""
        from torchvision.io import decode_jpeg

        count = len(self.source.decoded.offsets)
        stored = [self.reader.photo_bytes(i % len(self.reader)) for i in range(count)]
        data = [torch.from_numpy(np.frombuffer(x, np.uint8).copy()) for x in stored]
        for _ in range(self.steps):
            decode_jpeg(data, device=self.device)

    def sides(self) -> dict[str, Callable[[], None]]:
        sides = {
            "copy alone": self.copy,
            "crops alone": self.cut,
            "feed alone (copy + crops)": self.feed_alone,
            "step alone": self.step_alone,
            "steps from the feed": self.both,
        }
        if self.device.type == "cuda":
            sides["nvJPEG decode (torchvision)"] = self.nvjpeg
        return sides

    def seconds(self, side: Callable[[], None]) -> float:
        """Of one batch, the device's work included."""
        self.synchronize()
        start = time.perf_counter()
        side()
        self.synchronize()
        return (time.perf_counter() - start) / self.steps

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


SMALL_VIEWS: dict[str, Any] = {
    "global_crops_size": 32,
    "local_crops_size": 16,
    "local_crops_number": 2,
    "patch_size": 16,
}


def hidden(feed: float, step: float, both: float) -> float:
    """The share of the feed's time that the step covers."""
    return (feed + step - both) / feed


def report(times: dict[str, list[float]], batch: int, gigabytes: float, console: Console) -> None:
    table = Table(title=f"croppers on the GPU, batch {batch}")
    for heading in ("", "ms a batch", "images/s"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, values in times.items():
        rates = [batch / value for value in values]
        table.add_row(name, spread([1e3 * value for value in values]), spread(rates))
    console.print(table)
    middle = {name: quartiles(values)[0] for name, values in times.items()}
    crops, feed = middle["crops alone"], middle["feed alone (copy + crops)"]
    step, both = middle["step alone"], middle["steps from the feed"]
    console.print(
        f"crops take {crops / step:.1%} of a step; copies run at"
        f" {gigabytes / middle['copy alone']:.1f} GB/s; {hidden(feed, step, both):.0%} of the feed"
        f" is hidden behind the step, which becomes {both / step - 1:.1%} longer"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", help=".beton file (default: photos drawn for the purpose)")
    parser.add_argument("--arch", default="vit_s")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--interpreted", action="store_true", help="on the CPU, by Triton's interpreter, tiny"
    )
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    if args.interpreted:
        args.arch, args.batch_size, args.precision = "vit_t", 2, "fp32"
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
        data = args.data or synthetic_beton(Path(folder))
        bench = Bench(args, data)
        sides = bench.sides()
        times: dict[str, list[float]] = {name: [] for name in sides}
        for round_number in range(args.rounds + 1):
            for name, side in sides.items():
                took = bench.seconds(side)
                if round_number:  # the first compiles
                    times[name].append(took)
    about = machine("torch", "triton", "torchvision")
    if not args.interpreted:
        about["processor"] = torch.cuda.get_device_name()
    report(times, args.batch_size, bench.source.decoded.parts[0].numel() / 1e9, console)
    console.print(f"{in_words(about)}; medians (quartiles) of {args.rounds} rounds, in turns")
    if args.interpreted:
        console.print("by Triton's interpreter: these times say nothing about a GPU")
    if args.json:
        settings = {**vars(args), "json": None}
        figures = {"machine": about, "settings": settings, "seconds_a_batch": times}
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    run_or_exit(main)
