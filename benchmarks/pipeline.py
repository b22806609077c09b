"""Images/s of everything that makes crops, from bytes to twelve finished views.

    python benchmarks/pipeline.py --data photos.beton            # one core, then two
    python benchmarks/pipeline.py                                # on photos that it draws itself
    python benchmarks/pipeline.py --like two-crops               # 2 x RandomResizedCrop 224, flip

Side by side, in rounds that take turns: reading the bytes, decoding them by libjpeg-turbo (the
limit), the published recipe (Pillow), and our loaders. All see the same photos in each round and
make the same views: normalized float32 tensors, or uint8 where a row says pixels or views. On one
core rates are per CPU second, so other processes do not distort them.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.table import Table

from ibeton.benchmarks.harness import measure as harness
from ibeton.benchmarks.harness.measure import ratios, spread, take_turns
from ibeton.benchmarks.synthetic.dataset import synthetic_beton
from ibeton.command import run_or_exit
from ibeton.pipeline import PipelineConfig, build_loader
from ibeton.pipeline.batch import BatchPlan, normalized
from ibeton.pipeline.crops.cpu import cut_views
from ibeton.pipeline.crops.reference import cut_views_reference
from ibeton.pipeline.loaders import LOADERS, RECIPE
from ibeton.pipeline.loaders.context import Cutter, PhotoSource, context_of
from ibeton.pipeline.loaders.kinds import turbojpeg_problem
from ibeton.pipeline.sampling.draws import ViewSpec, draw_views, stack_shape
from ibeton.pipeline.store.beton import JPG, BetonReader
from ibeton.pipeline.store.photos import is_beton, turbo_pixels
from ibeton.progress import plain_console

BATCH = 32
RECIPE_ROW, LIMIT = "published recipe (Pillow)", "libjpeg-turbo decode alone"
CROPS = "our crops of decoded photos"
ON_ONE_CORE = ("read bytes", LIMIT, RECIPE_ROW, CROPS)
# The task that slipstream publishes: one decode, two random resized crops, no colors.
TWO_CROPS = [ViewSpec(224, (0.08, 1.0), blur_p=0.0, solarize_p=0.0, jitter_p=0.0, gray_p=0.0)] * 2
Side = Callable[[], int]


class Bench:
    """The sides for one .beton file: `workers` threads each, whole batches of `images` a turn."""

    def __init__(
        self, data: str, workers: int, images: int, two_crops: bool, stack: ExitStack
    ) -> None:
        self.config = PipelineConfig(data=(data,), workers=workers, batch_size=BATCH)
        self.reader, self.two_crops = BetonReader(data), two_crops
        self.views = TWO_CROPS if two_crops else self.config.views()
        batches = images // BATCH
        self.photos = [i % len(self.reader) for i in range(batches * BATCH)]  # of each turn
        self.mean, self.std = torch.tensor(self.config.mean), torch.tensor(self.config.std)
        self.stack = stack
        views = self.config.global_crops_number
        self.shapes = stack_shape(self.views[:views]), stack_shape(self.views[views:])

    def read(self) -> int:
        total = 0
        for index in self.photos:
            total += int(np.frombuffer(self.reader.photo_bytes(index), np.uint8)[::64].sum())
        return len(self.photos) if total else 0

    def decode(self) -> int:
        for index in self.photos:
            turbo_pixels(self.reader, index)
        return len(self.photos)

    def recipe(self) -> int:
        sizes = [view.size for view in self.views]
        for index in self.photos:
            photo = Image.fromarray(self.reader.pixels(index))
            draws = draw_views(self.views, 0, 0, index, photo.height, photo.width)
            for view in cut_views_reference(photo, draws, sizes):
                planes = torch.from_numpy(view.transpose(2, 0, 1).copy())
                planes.float().div(255).sub_(self.mean.view(3, 1, 1)).div_(self.std.view(3, 1, 1))
        return len(self.photos)

    def crops(self) -> int:
        """The views of decoded photos: no decode, no loader."""
        large, small = (np.empty(shape, np.uint8) for shape in self.shapes)
        for index in self.photos:
            pixels = self.decoded[index]
            cut_views(pixels, draw_views(self.views, 0, 0, index, *pixels.shape[:2]), large, small)
            for views in (large, small):
                normalized(torch.from_numpy(views)[None], self.mean, self.std)
        return len(self.photos)

    def plans(self) -> Iterator[BatchPlan]:
        """The batches of a turn, and none after them: a loader would make it in others' turns."""
        for rows in np.array(self.photos).reshape(-1, BATCH):
            yield BatchPlan(0, rows)

    def loader(self, kind: str) -> Side:
        """The whole loader, as in training."""
        loader = build_loader(replace(self.config, loader=kind))
        self.stack.callback(loader.close)

        def side() -> int:
            made = loader._cutter.stream(self.plans())
            return sum(len(loader._finish(plan, crops).indices) for plan, crops in made)

        return side

    def part(self, made: Cutter | PhotoSource) -> Side:
        """What a loader gives before normalization: pixels for a GPU, or views."""
        return lambda: sum(len(plan.indices) for plan, _ in made.stream(self.plans()))

    def sides(self) -> dict[str, Side]:
        """By name, for as many cores as the process may use; those that use but one are marked."""
        self.decoded = {i: self.reader.pixels(i) for i in self.photos}
        sides: dict[str, Side] = {"read bytes": self.read}
        if not turbojpeg_problem() and (self.reader.modes == JPG).all():
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


def main() -> None:
    parser = harness.make_parser(__doc__)
    images = harness.integer(BATCH)
    parser.add_argument("--data", help=".beton file (default: photos drawn for the purpose)")
    parser.add_argument("--like", choices=("recipe", "two-crops"), default="recipe")
    parser.add_argument(
        "--images", type=images, default=4 * BATCH, help="images per side and round"
    )
    parser.add_argument("--cores", type=int, default=2, help="also measure with so many cores")
    args = parser.parse_args()
    if args.data and not is_beton(args.data):
        parser.error(
            f"--data {args.data} is not a .beton file; make one: ibeton convert"
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
