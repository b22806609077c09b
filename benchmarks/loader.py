"""Do the loader's workers ever stand idle? Its images/s over what its decoder gives alone.

    python benchmarks/loader.py --data photos.beton      # 1, 2, 4 workers, batches of 16 to 256
    python benchmarks/loader.py --like two-crops         # 2 x RandomResizedCrop 224 and a flip

Both sides use the same threads and the same photos, in rounds that take turns. `--like two-crops`
measures the task that slipstream publishes (one decode, two crops, no colors), for each core.
"""

import argparse
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ibeton.benchmarks.harness.measure import in_words, machine, spread, take_turns
from ibeton.benchmarks.synthetic.dataset import synthetic_beton
from ibeton.pipeline.batch import BatchPlan
from ibeton.pipeline.loaders.context import LoaderContext
from ibeton.pipeline.loaders.ffcv import FfcvCrops, FfcvPixels
from ibeton.pipeline.loaders.replacements import Replacements
from ibeton.pipeline.sampling import ViewSpec
from ibeton.pipeline.store import BetonReader, Decoder, is_beton

PLAIN = ViewSpec(224, (0.08, 1.0), blur_p=0.0, solarize_p=0.0, jitter_p=0.0, gray_p=0.0)


@dataclass
class Sides:
    """Two ways to work on `images` photos, with `workers` threads each."""

    reader: BetonReader
    path: str
    workers: int
    batch: int
    images: int
    crops: bool

    def decode(self) -> int:
        """Each thread decodes photos one after the other, and does nothing else."""
        places = count()

        def work() -> None:
            with closing(Decoder()) as decoder:
                while (place := next(places)) < self.images:
                    i = place % len(self.reader)
                    sides = int(self.reader.heights[i]), int(self.reader.widths[i])
                    decoder.decode(self.reader.photo_bytes(i), *sides)

        threads = [threading.Thread(target=work) for _ in range(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.images

    def loader(self) -> int:
        """The loader over whole batches."""
        context = LoaderContext(
            data=self.path,
            photos=self.reader,
            views=[PLAIN, PLAIN],
            global_views=2,
            batch_size=self.batch,
            workers=self.workers,
            batches_ahead=2,
            seed=0,
            replacements=Replacements(self.reader, [PLAIN, PLAIN], 0),
            device=torch.device("cpu"),
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
        )
        batches = self.images // self.batch
        order = np.arange(batches * self.batch) % len(self.reader)
        plans = (BatchPlan(0, indices) for indices in order.reshape(batches, self.batch))
        made = FfcvCrops(context) if self.crops else FfcvPixels(context, pinned=False)
        return sum(len(plan.indices) for plan, _ in made.stream(plans))


def measure(sides: Sides, rounds: int) -> tuple[str, str, str]:
    """Rates of both sides and their ratio, in words."""
    sides.loader()  # compiles, and brings the photos into memory
    rates = take_turns({"decode": sides.decode, "loader": sides.loader}, rounds)
    ratio = [a / b for a, b in zip(rates["loader"], rates["decode"], strict=True)]
    return spread(rates["decode"]), spread(rates["loader"]), spread(ratio, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", help=".beton file (default: photos drawn for the purpose)")
    parser.add_argument("--like", choices=("decode", "two-crops"), default="decode")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--images", type=int, default=512, help="images per round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.data and not is_beton(args.data):
        parser.error(
            f"--data {args.data} is not a .beton file: python -m pipeline.convert makes one"
        )
    if args.images < max(args.batch_size) or min(args.workers) < 1 or args.rounds < 2:
        parser.error("--images must fill a batch, --workers be at least 1 and --rounds at least 2")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or synthetic_beton(Path(folder))
        table = Table(title=f"images/s of the ffcv loader, {args.like}")
        for heading in ("workers", "batch", "decode alone", "loader", "loader / decode"):
            table.add_column(heading, justify="right")
        began = time.perf_counter()
        for workers in args.workers:
            for batch in args.batch_size:
                crops = args.like == "two-crops"
                sides = Sides(BetonReader(data), str(data), workers, batch, args.images, crops)
                table.add_row(str(workers), str(batch), *measure(sides, args.rounds))
        console = Console(width=100)
        console.print(table)
        console.print(
            f"{in_words(machine('torch', 'numba', 'pillow'))}; medians (quartiles) of {args.rounds}"
            f" rounds, taken in turns; {time.perf_counter() - began:.0f} s"
        )


if __name__ == "__main__":
    main()
