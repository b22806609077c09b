"""Do the loader's workers ever stand idle? Its images/s over what its decoder gives alone.

    python benchmarks/loader.py --data photos.beton      # 1, 2, 4 workers, batches of 16 to 256
    python benchmarks/loader.py --decode gpu             # nvJPEG alone, cores alone, both
    python benchmarks/loader.py --borders                # waits at the borders of short epochs

All sides use the same threads and the same photos, in rounds that take turns.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ibeton.benchmarks.harness import measure as harness
from ibeton.benchmarks.harness.measure import ratios, spread, take_turns
from ibeton.benchmarks.synthetic.dataset import synthetic_beton
from ibeton.command import run_or_exit
from ibeton.pipeline import PipelineConfig, build_loader
from ibeton.pipeline.batch import BatchPlan
from ibeton.pipeline.loaders import LOADERS
from ibeton.pipeline.loaders.context import PhotoSource, context_of
from ibeton.pipeline.loaders.gpu_decode import GpuDecoding, NvJpeg, nvjpeg_problem
from ibeton.pipeline.memory import keep_freed_memory
from ibeton.pipeline.store.beton import BetonReader
from ibeton.pipeline.store.photos import is_beton
from ibeton.pipeline.store.turbojpeg import Decoder
from ibeton.progress import plain_console
from ibeton.workers import cores

BATCHES = 8  # of a round at least: the first ones fill an empty pipeline, the last ones empty it
EPOCHS, STEPS, SMALL_BATCH = 10, 20, 16  # of --borders


class Sides:
    """Two ways to work on `images` photos, with `workers` threads each."""

    def __init__(self, reader: BetonReader, workers: int, batch: int, images: int) -> None:
        self.reader, self.workers, self.batch = reader, workers, batch
        self.images = max(images, BATCHES * batch) // batch * batch
        self.source = self.pixels()

    def pixels(self, *shared: Any) -> PhotoSource:
        """The loader's decoder. `shared`: the GPU and its part, as in `context_of`."""
        data = (str(self.reader.path),)
        config = PipelineConfig(data=data, workers=self.workers, batch_size=self.batch)
        make = next(kind.pixels for kind in LOADERS.values() if kind.share_decoding)
        assert make is not None
        return make(context_of(config, self.reader, *shared))

    def decode(self) -> int:
        """Each thread decodes photos one after the other, and does nothing else."""
        places = count()

        def work() -> None:
            with closing(Decoder()) as decoder:
                while (place := next(places)) < self.images:
                    i = place % len(self.reader)
                    sides = int(self.reader.heights[i]), int(self.reader.widths[i])
                    decoder.decode(self.reader.photo_bytes(i), *sides)

        with ThreadPoolExecutor(self.workers) as threads:
            for done in [threads.submit(work) for _ in range(self.workers)]:
                done.result()
        return self.images

    def plans(self) -> Iterator[BatchPlan]:
        """The same photos, in batches."""
        order = np.arange(self.images) % len(self.reader)
        return (BatchPlan(0, indices) for indices in order.reshape(-1, self.batch))

    def stream(self, source: PhotoSource) -> int:
        return sum(len(plan.indices) for plan, _ in source.stream(self.plans()))

    def loader(self) -> int:
        return self.stream(self.source)


def idle_workers(args: argparse.Namespace, reader: BetonReader, console: Console) -> object:
    """A row for each number of workers and each batch size."""
    headings = ("batch", "decode alone", "loader", "loader / decode")
    table = harness.figures("workers", *headings, title="images/s of the loader, pixels for a GPU")
    figures = []
    for workers in args.workers:
        for batch in args.batch_size:
            sides = Sides(reader, workers, batch, args.images)
            rates = take_turns({"decode": sides.decode, "loader": sides.loader}, args.rounds)
            cells = spread(rates["decode"]), spread(rates["loader"])
            ratio = spread(ratios(rates, "loader", "decode"), 2)
            table.add_row(str(workers), str(batch), *cells, ratio)
            figures.append({"workers": workers, "batch": batch, **rates})
    console.print(table)
    return figures


def gpu_decode(args: argparse.Namespace, reader: BetonReader, console: Console) -> object:
    """nvJPEG with its checks, CPU threads, and both together; and how far their pixels differ."""
    workers, batch, device = max(args.workers), max(args.batch_size), torch.device("cuda", 0)
    gpu = GpuDecoding(reader, NvJpeg(device))
    good, tried = gpu.trial(workers)
    sides = Sides(reader, workers, batch, args.images)
    for plan in sides.plans():  # the GPU decodes what a CPU has seen
        for i in plan.indices:
            pixels = torch.from_numpy(reader.pixels(int(i)).reshape(-1))
            gpu.remember(np.array([i]), pixels, np.zeros(1, np.int64))
    both = sides.pixels(device, gpu)

    def by_gpu() -> int:
        return sum(int(gpu.decode(plan.indices).good.sum()) for plan in sides.plans())

    ways = {"GPU": by_gpu, "CPU": sides.loader, "both": lambda: sides.stream(both)}
    rates = take_turns(ways, args.rounds)
    title = f"decode, {workers} threads, batch {batch}"
    table = harness.figures("", "images/s", title=title)
    for name, values in rates.items():
        table.add_row(name, spread(values))
    console.print(table)
    some = np.arange(min(batch, len(reader)))
    photos, away = gpu.decode(some), []
    for i in np.flatnonzero(photos.good):
        ours = torch.from_numpy(reader.pixels(int(i)).reshape(-1)).int()
        begin = int(photos.offsets[i])
        theirs = photos.pixels[begin : begin + ours.numel()].cpu().int()
        away.append((float((ours - theirs).abs().float().mean()), int((ours - theirs).abs().max())))
    console.print(f"{good} of {tried} photos decoded by nvJPEG{in_words(away)}")
    return {"images_per_s": rates, "good": good, "tried": tried, "mean_and_most": away}


def in_words(away: list[tuple[float, int]]) -> str:
    """How far pixels are away, from the mean and the largest distance of each photo; empty if there
    is none."""
    if not away:
        return ""
    mean, most = np.mean(away, axis=0)[0], np.max(away, axis=0)[1]
    return (
        f"; its pixels differ from libjpeg-turbo's by {mean:.3f} of 255 in the mean, {most:.0f} at"
        " most"
    )


def borders(data: str | Path, console: Console) -> object:
    """How long each step of short epochs waits for its batch, where a step takes 1.5 times as long
    as the loader needs. First steps of epochs are listed apart."""
    size = {"global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 2}
    config = PipelineConfig(data=(str(data),), batch_size=SMALL_BATCH, patch_size=8, **size)  # type: ignore[arg-type]
    loader = build_loader(config)
    list(loader.epoch(0))  # compiles
    began = time.perf_counter()
    steps = len(list(loader.epoch(1)))
    pause = 1.5 * (time.perf_counter() - began) / steps
    waits: dict[str, list[float]] = {"first of an epoch": [], "others": []}
    for epoch in range(2, 2 + EPOCHS):
        batches = loader.epoch(epoch)
        for step in range(loader.steps_per_epoch):
            began = time.perf_counter()
            next(batches)
            waited = 1000 * (time.perf_counter() - began)
            waits["others" if step else "first of an epoch"].append(waited)
            time.sleep(pause)
        next(batches, None)
    loader.close()
    title = f"{EPOCHS} epochs of {loader.steps_per_epoch} steps, {1000 * pause:.1f} ms each"
    table = harness.figures("step", "waits", "ms", "longest ms", title=title)
    for name, ms in waits.items():
        table.add_row(name, str(len(ms)), spread(ms), f"{max(ms):.2f}")
    console.print(table)
    return waits


def arguments() -> argparse.Namespace:
    parser, positive = harness.make_parser(__doc__), harness.integer(1)
    parser.add_argument("--data", help=".beton file (default: photos drawn for the purpose)")
    parser.add_argument("--decode", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--borders", action="store_true", help="list waits of short epochs instead")
    parser.add_argument("--workers", type=positive, nargs="+", help="(default: 1 2 4; all cores)")
    parser.add_argument("--batch-size", type=positive, nargs="+", default=[16, 64, 256])
    parser.add_argument(
        "--images", type=positive, default=512, help=f"images per round, at least {BATCHES} batches"
    )
    args = parser.parse_args()
    args.workers = args.workers or ([cores()] if args.decode == "gpu" else [1, 2, 4])
    if args.data and not is_beton(args.data):
        parser.error(f"--data {args.data} is not a .beton file: ibeton convert makes one")
    if args.decode == "gpu":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if problem := nvjpeg_problem(device):
            parser.error(f"--decode gpu {problem}")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    keep_freed_memory()
    console, on_gpu = plain_console(width=100), args.decode == "gpu"
    with tempfile.TemporaryDirectory() as folder:
        if args.borders:
            data = args.data or synthetic_beton(Path(folder), 1 + STEPS * SMALL_BATCH // 10)
            results = borders(data, console)
        else:
            run = gpu_decode if on_gpu else idle_workers
            reader = BetonReader(args.data or synthetic_beton(Path(folder)))
            results = run(args, reader, console)
    about = harness.machine("torch", "torchvision", "numba")
    if on_gpu:
        about["processor"] += f", {torch.cuda.get_device_name()}"
    rounds = 0 if args.borders else args.rounds
    harness.conclude(console, about, rounds, args.json, figures=results)


if __name__ == "__main__":
    run_or_exit(main)
