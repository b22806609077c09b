"""Images/s of everything that makes crops, from bytes to twelve finished views.

    python benchmarks/pipeline.py --data photos.beton            # one core, then two
    python benchmarks/pipeline.py                                # on photos that it draws itself

Side by side, in rounds that take turns: reading the bytes, decoding them by libjpeg-turbo (the
limit), the published recipe (Pillow), and our loaders. All see the same bytes and make the same
views: normalized float32 tensors, except where a row says pixels.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from ibeton.benchmarks.harness.measure import (
    in_words,
    machine,
    quartiles,
    ratios,
    spread,
    take_turns,
)
from ibeton.benchmarks.synthetic.dataset import synthetic_beton
from ibeton.pipeline import PipelineConfig, build_loader
from ibeton.pipeline.batch import BatchPlan, normalized
from ibeton.pipeline.crops import cut_views, cut_views_reference
from ibeton.pipeline.loaders import LOADERS
from ibeton.pipeline.sampling import draw_views, epoch_order, rank_batches, stack_shape
from ibeton.pipeline.store import BetonReader, Decoder, decode_photo, is_beton
from ibeton.workers import end_with_parent

BATCH = 32  # of fewer, threads would wait for the one with the largest photos
RECIPE, LIMIT = "published recipe (Pillow)", "libjpeg-turbo decode alone"
Side = Callable[[], int]


class Bench:
    """The sides for one .beton file, `workers` threads each; `images` a round of a fast side."""

    def __init__(self, data: str, workers: int, images: int, stack: ExitStack) -> None:
        self.config = PipelineConfig(data=data, workers=workers, batch_size=BATCH)
        self.reader, self.views = BetonReader(data), self.config.views()
        self.images, self.place = images, 0
        self.mean, self.std = torch.tensor(self.config.mean), torch.tensor(self.config.std)
        self.stack = stack
        views = self.config.global_crops_number
        self.shapes = stack_shape(self.views[:views]), stack_shape(self.views[views:])

    def some(self, number: int) -> list[int]:
        """The next samples, round and round."""
        start, self.place = self.place, self.place + number
        return [i % len(self.reader) for i in range(start, start + number)]

    def read(self) -> int:
        total = 0
        for index in self.some(self.images * 8):
            total += int(np.frombuffer(self.reader.photo_bytes(index), np.uint8)[::64].sum())
        return self.images * 8 if total else 0

    def decode(self) -> int:
        for index in self.some(self.images):
            sides = int(self.reader.heights[index]), int(self.reader.widths[index])
            self.decoder.decode(self.reader.photo_bytes(index), *sides)
        return self.images

    def recipe(self) -> int:
        sizes = [view.size for view in self.views]
        few = max(1, self.images // 8)
        for index in self.some(few):
            photo = Image.fromarray(decode_photo(self.reader.photo_bytes(index)))
            draws = draw_views(self.views, 0, 0, index, photo.height, photo.width)
            for view in cut_views_reference(photo, draws, sizes):
                planes = torch.from_numpy(view.transpose(2, 0, 1).copy())
                planes.float().div(255).sub_(self.mean.view(3, 1, 1)).div_(self.std.view(3, 1, 1))
        return few

    def crops(self) -> int:
        """Twelve views of decoded photos: no decode, no loader."""
        large, small = (np.empty(shape, np.uint8) for shape in self.shapes)
        for index in self.some(self.images):
            pixels = self.decoded[index % len(self.decoded)]
            cut_views(pixels, draw_views(self.views, 0, 0, index, *pixels.shape[:2]), large, small)
            for views in (large, small):
                normalized(torch.from_numpy(views)[None], self.mean, self.std)
        return self.images

    def loader(self, kind: str) -> Side:
        loader = build_loader(replace(self.config, loader=kind))
        self.stack.callback(loader.close)
        epochs = count()

        def side() -> int:
            first_step = max(0, loader.steps_per_epoch - self.images * 4 // BATCH)
            done = sum(len(batch.indices) for batch in loader.epoch(next(epochs), first_step))
            loader.discard_ahead()  # or it would work in the turns of the others
            return done

        return side

    def pixels_only(self) -> Side:
        """Packed pixels for croppers on a GPU."""
        from ibeton.pipeline.loaders.context import context_of
        from ibeton.pipeline.loaders.ffcv import FfcvPixels

        config = self.config
        source, epochs = FfcvPixels(context_of(config, self.reader), pinned=False), count()

        def side() -> int:
            epoch = next(epochs)
            order = epoch_order(len(self.reader), config.seed, epoch)
            batches = rank_batches(order, BATCH, 0, 1)[: self.images * 4 // BATCH]
            plans = (BatchPlan(epoch, indices) for indices in batches)
            return sum(len(photos.offsets) for _, photos in source.stream(plans))

        return side

    def sides(self) -> dict[str, Side]:
        self.decoded = [self.reader.pixels(i) for i in range(min(64, len(self.reader)))]
        sides: dict[str, Side] = {"read bytes": self.read}
        if not LOADERS["ffcv"].problem():
            self.decoder = Decoder()
            sides[LIMIT] = self.decode
        sides |= {RECIPE: self.recipe, "our crops of decoded photos": self.crops}
        if not LOADERS["ffcv"].problem():
            sides["ffcv: pixels for a GPU"] = self.pixels_only()
            sides["ffcv loader, crops on the CPU"] = self.loader("ffcv")
        if not LOADERS["dali"].problem():
            sides["dali loader, crops on the CPU"] = self.loader("dali")
        return sides


def measure(data: str, cores: list[int], images: int, rounds: int) -> dict[str, list[float]]:
    """Rates of all sides on `cores`. The single-threaded ones have but one core to run on."""
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        bench = Bench(data, len(cores), images, stack)
        sides = bench.sides()
        if len(cores) > 1:  # the others do not use more than one
            sides = {name: side for name, side in sides.items() if "ffcv" in name or "dali" in name}
        return take_turns(sides, rounds)


def measured_apart(*arguments: Any) -> dict[str, list[float]]:
    """The same in a process of its own: thread pools keep the size that they began with."""
    with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as process:
        return process.submit(measure, *arguments).result()


def plot(rates: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Bars of images/s, one group for each number of cores."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [
        (f"{name}, {cores}", values)
        for cores, sides in rates.items()
        for name, values in sides.items()
        if name != "read bytes"
    ]
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(rows) + 1.2), layout="constrained")
    middles = [quartiles(values)[0] for _, values in rows]
    colors = ["#999999" if n.startswith((RECIPE, LIMIT)) else "#2a78b5" for n, _ in rows]
    bars = axes.barh([name for name, _ in rows], middles, color=colors)
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("images/s (median of rounds)")
    axes.set_xlim(0, max(middles) * 1.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", help=".beton file (default: photos drawn for the purpose)")
    parser.add_argument("--images", type=int, default=64, help="images a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that each side has")
    parser.add_argument("--cores", type=int, default=2, help="also measure with so many cores")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--plot", type=Path, help="write a bar chart to this PNG file")
    args = parser.parse_args()
    if args.data and not is_beton(args.data):
        parser.error(
            f"--data {args.data} is not a .beton file; make one: python -m pipeline.convert"
            f" {args.data} photos.beton"
        )
    if args.images < BATCH or args.rounds < 2:
        parser.error(f"--images must be at least {BATCH} and --rounds at least 2")

    about = machine("torch", "numba", "pillow", "ffcv", "nvidia-dali-cuda120")
    at_hand = sorted(os.sched_getaffinity(0))
    console = Console(width=100)
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or synthetic_beton(Path(folder))
        rates = {"1 core": measured_apart(data, at_hand[:1], args.images, args.rounds)}
        if args.cores > 1 and len(at_hand) >= args.cores:
            name = f"{args.cores} cores"
            rates[name] = measured_apart(data, at_hand[: args.cores], args.images, args.rounds)
        reader = BetonReader(data)
        megapixels = float((reader.heights.astype(float) * reader.widths).mean() / 1e6)
    for cores, sides in rates.items():
        console.print(table(cores, sides, rates["1 core"]))
    console.print(
        f"{len(reader)} photos of {megapixels:.2f} megapixels on average; {in_words(about)};"
        f" medians (quartiles) of {args.rounds} rounds, taken in turns"
    )
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "images_per_s": rates}, indent=1))
    if args.plot:
        plot(rates, args.plot)


def table(cores: str, sides: dict[str, list[float]], one: dict[str, list[float]]) -> Table:
    """Rates, and their ratios to the recipe and to the decoder; those of more cores to one core."""
    out = Table(title=f"images/s, {cores}")
    first = one is sides
    columns = ("x recipe", "share of decode") if first else ("x one core",)
    for heading in ("", "images/s", *columns):
        out.add_column(heading, justify="left" if not heading else "right")
    for name, values in sides.items():
        cells = [spread(values)]
        if not first:
            cells.append(spread([a / b for a, b in zip(values, one[name], strict=True)]))
        else:
            cells.append(spread(ratios(sides, name, RECIPE)))
            cells.append(spread(ratios(sides, name, LIMIT), 2) if LIMIT in sides else "")
        out.add_row(name, *cells)
    return out


if __name__ == "__main__":
    main()
