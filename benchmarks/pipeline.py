"""Images/s of everything that makes crops, from bytes to twelve finished views.

    python benchmarks/pipeline.py --data photos.beton            # one core, then two
    python benchmarks/pipeline.py                                # on photos that it draws itself
    python benchmarks/pipeline.py --like two-crops               # 2 x RandomResizedCrop 224, flip

Side by side, in rounds that take turns: reading the bytes, decoding them by libjpeg-turbo (the
limit), the published recipe (Pillow), and our loaders. All see the same bytes and make the same
views: normalized float32 tensors, or uint8 where a row says pixels or views. On one core rates are
per CPU second, so other processes do not distort them.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.table import Table

from ibeton.benchmarks.harness import measure as harness
from ibeton.benchmarks.harness.measure import quartiles, ratios, spread, take_turns
from ibeton.benchmarks.synthetic.dataset import synthetic_beton
from ibeton.command import run_or_exit
from ibeton.pipeline import PipelineConfig, build_loader
from ibeton.pipeline.batch import BatchPlan, normalized
from ibeton.pipeline.crops.cpu import cut_views
from ibeton.pipeline.crops.reference import cut_views_reference
from ibeton.pipeline.loaders import LOADERS, RECIPE
from ibeton.pipeline.loaders.context import Cutter, PhotoSource, context_of
from ibeton.pipeline.loaders.kinds import turbojpeg_problem
from ibeton.pipeline.sampling import ViewSpec, draw_views, stack_shape
from ibeton.pipeline.store import JPG, BetonReader, Decoder, is_beton
from ibeton.progress import plain_console

BATCH = 32
RECIPE_ROW, LIMIT = "published recipe (Pillow)", "libjpeg-turbo decode alone"
CROPS = "our crops of decoded photos"
ON_ONE_CORE = ("read bytes", LIMIT, RECIPE_ROW, CROPS)
# The task that slipstream publishes: one decode, two random resized crops, no colors.
TWO_CROPS = [ViewSpec(224, (0.08, 1.0), blur_p=0.0, solarize_p=0.0, jitter_p=0.0, gray_p=0.0)] * 2
Side = Callable[[], int]


class Bench:
    """The sides for one .beton file, `workers` threads each; `images` per round of a fast side."""

    def __init__(
        self, data: str, workers: int, images: int, two_crops: bool, stack: ExitStack
    ) -> None:
        self.config = PipelineConfig(data=(data,), workers=workers, batch_size=BATCH)
        self.reader, self.two_crops = BetonReader(data), two_crops
        self.views = TWO_CROPS if two_crops else self.config.views()
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
            photo = Image.fromarray(self.reader.pixels(index))
            draws = draw_views(self.views, 0, 0, index, photo.height, photo.width)
            for view in cut_views_reference(photo, draws, sizes):
                planes = torch.from_numpy(view.transpose(2, 0, 1).copy())
                planes.float().div(255).sub_(self.mean.view(3, 1, 1)).div_(self.std.view(3, 1, 1))
        return few

    def crops(self) -> int:
        """The views of decoded photos: no decode, no loader."""
        large, small = (np.empty(shape, np.uint8) for shape in self.shapes)
        for index in self.some(self.images):
            pixels = self.decoded[index % len(self.decoded)]
            cut_views(pixels, draw_views(self.views, 0, 0, index, *pixels.shape[:2]), large, small)
            for views in (large, small):
                normalized(torch.from_numpy(views)[None], self.mean, self.std)
        return self.images

    def loader(self, kind: str) -> Side:
        """The whole loader, as in training."""
        loader = build_loader(replace(self.config, loader=kind))
        self.stack.callback(loader.close)
        epochs = count()

        def side() -> int:
            first_step = max(0, loader.steps_per_epoch - self.images * 4 // BATCH)
            done = sum(len(batch.indices) for batch in loader.epoch(next(epochs), first_step))
            loader.discard_ahead()  # or it would work in the turns of the others
            return done

        return side

    def part(self, made: Cutter | PhotoSource) -> Side:
        """What a loader gives before normalization: pixels for a GPU, or views."""
        numbers = count()

        def plans() -> Iterator[BatchPlan]:
            for _ in range(self.images * 4 // BATCH):
                yield BatchPlan(next(numbers), np.array(self.some(BATCH)))

        return lambda: sum(len(plan.indices) for plan, _ in made.stream(plans()))

    def sides(self) -> dict[str, Side]:
        """By name, for as many cores as the process may use; those that use but one are marked."""
        self.decoded = [self.reader.pixels(i) for i in range(min(64, len(self.reader)))]
        sides: dict[str, Side] = {"read bytes": self.read}
        if not turbojpeg_problem() and (self.reader.modes == JPG).all():
            self.decoder = Decoder()
            sides[LIMIT] = self.decode
        sides |= {RECIPE_ROW: self.recipe, CROPS: self.crops}
        context = context_of(self.config, self.reader, views=self.views)
        for name, kind in LOADERS.items():
            if name == RECIPE or kind.problem():
                continue
            if self.two_crops:
                sides[f"{name}: views on the CPU"] = self.part(kind.crops(context))
                continue
            if kind.pixels and not kind.decodes_on_gpu:
                sides[f"{name}: pixels for a GPU"] = self.part(kind.pixels(context))
            sides[f"{name} loader, crops on the CPU"] = self.loader(name)
        return sides


def measure(
    data: str, cores: list[int], images: int, rounds: int, two_crops: bool
) -> dict[str, list[float]]:
    """Rates of all sides on `cores`, in a process of its own. On one core they are per CPU second,
    which is a second where the process has the core to itself; the single-threaded sides run on no
    more than one."""
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        sides = Bench(data, len(cores), images, two_crops, stack).sides()
        if len(cores) > 1:
            sides = {name: side for name, side in sides.items() if name not in ON_ONE_CORE}
        return take_turns(
            sides, rounds, time.process_time if len(cores) == 1 else time.perf_counter
        )


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
    colors = ["#999999" if n.startswith((RECIPE_ROW, LIMIT)) else "#2a78b5" for n, _ in rows]
    bars = axes.barh([name for name, _ in rows], middles, color=colors)
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("images/s (median of rounds)")
    axes.set_xlim(0, max(middles) * 1.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = harness.make_parser(__doc__)
    images = harness.integer(BATCH)
    parser.add_argument("--data", help=".beton file (default: photos drawn for the purpose)")
    parser.add_argument("--like", choices=("recipe", "two-crops"), default="recipe")
    parser.add_argument("--images", type=images, default=64, help="images per round")
    parser.add_argument("--cores", type=int, default=2, help="also measure with so many cores")
    parser.add_argument("--plot", type=Path, help="write a bar chart to this PNG file")
    args = parser.parse_args()
    if args.data and not is_beton(args.data):
        parser.error(
            f"--data {args.data} is not a .beton file; make one: python -m pipeline.convert"
            f" {args.data} photos.beton"
        )

    about = harness.machine("torch", "numba", "pillow", "ffcv", "nvidia-dali-cuda120")
    usable = sorted(os.sched_getaffinity(0))
    console = plain_console(width=100)
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or synthetic_beton(Path(folder))
        how = args.images, args.rounds, args.like == "two-crops"
        rates = {"1 core": harness.apart(measure, data, usable[:1], *how)}
        if args.cores > 1 and len(usable) >= args.cores:
            name = f"{args.cores} cores"
            rates[name] = harness.apart(measure, data, usable[: args.cores], *how)
        reader = BetonReader(data)
        megapixels = float((reader.heights.astype(float) * reader.widths).mean() / 1e6)
    for cores, sides in rates.items():
        console.print(table(cores, sides, rates["1 core"]))
    console.print(f"{len(reader)} photos of {megapixels:.2f} megapixels on average")
    harness.conclude(console, about, args.rounds, args.json, images_per_s=rates)
    if args.plot:
        plot(rates, args.plot)


def table(cores: str, sides: dict[str, list[float]], one: dict[str, list[float]]) -> Table:
    """Rates, and their ratios to the recipe and to the decoder; those of more cores to one core."""
    columns = ("x recipe", "share of decode") if one is sides else ("x one core",)
    out = harness.figures("", "images/s", *columns, title=f"images/s, {cores}")
    for name, values in sides.items():
        if one is sides:
            share = spread(ratios(sides, name, LIMIT), 2) if LIMIT in sides else ""
            out.add_row(name, spread(values), spread(ratios(sides, name, RECIPE_ROW)), share)
        else:
            more = spread([a / b for a, b in zip(values, one[name], strict=True)])
            out.add_row(name, spread(values), more)
    return out


if __name__ == "__main__":
    run_or_exit(main)
