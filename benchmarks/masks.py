"""Masks a second: the compiled sampler, a batch a call, against the plain Python reference.

`python benchmarks/masks.py` takes seconds on one core. Both sides draw the same masks; their
rounds take turns, so that a busy machine slows both. Compilation is not timed.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ibeton.benchmarks.harness.measure import in_words, machine, quartiles, spread
from ibeton.pipeline.sampling import KeyDraws, MaskConfig, draw_mask_reference, draw_masks

VIEWS = 2
# name, shape, patches of one side, ratio, ratio_var
CASES = [
    ("block, ViT 14 x 14", "block", 14, (0.0, 0.3), (0.0, 0.2)),
    ("rand, ViT 14 x 14", "rand", 14, (0.0, 0.7), (0.0, 0.05)),
    ("block, Swin 7 x 7", "block", 7, (0.0, 0.3), (0.0, 0.2)),
]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(config: MaskConfig, side: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """Return masks/s of both samplers, one figure a round, and their ratio."""
    few = max(1, batch // 16)  # images of a reference round: it is 100 times slower and more
    grid = (side, side)

    def compiled(epoch: int) -> np.ndarray:
        return draw_masks(config, 0, epoch, np.arange(batch), VIEWS, grid)

    def reference(epoch: int) -> list[list[np.ndarray]]:
        return [
            [draw_mask_reference(config, grid, KeyDraws(0, epoch, i, v)) for i in range(few)]
            for v in range(VIEWS)
        ]

    if not np.array_equal(compiled(0)[:, :few], np.array(reference(0))):
        raise SystemExit("the two samplers drew different masks; run tests/pipeline/test_masks.py")
    repeats = 20  # one compiled batch takes a millisecond, too short to time alone
    fast, plain = [], []
    for epoch in range(rounds):
        first = epoch * repeats
        took = seconds(lambda: [compiled(r) for r in range(first, first + repeats)])  # noqa: B023
        fast.append(repeats * VIEWS * batch / took)
        plain.append(VIEWS * few / seconds(lambda: reference(first)))  # noqa: B023
    ratios = [a / b for a, b in zip(fast, plain, strict=True)]
    return {"compiled": fast, "reference": plain, "ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch-size", type=int, default=256, help="images a call")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each sampler")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    if args.batch_size < 1 or args.rounds < 2:
        parser.error("--batch-size must be at least 1 and --rounds at least 2")

    about = machine("numba", "numpy")
    table = Table(title=f"thousand masks/s, {args.batch_size} images x {VIEWS} views a call")
    for heading in ("masks", "compiled", "reference", "ratio"):
        table.add_column(heading, justify="left" if heading == "masks" else "right")
    results = {}
    for name, shape, side, ratio, ratio_var in CASES:
        config = MaskConfig(shape=shape, ratio=ratio, ratio_var=ratio_var)
        results[name] = measure(config, side, args.batch_size, args.rounds)
        cells = []
        for kind in ("compiled", "reference"):
            cells.append(spread([rate / 1e3 for rate in results[name][kind]], 4))
        middle, low, high = quartiles(results[name]["ratio"])
        table.add_row(name, *cells, f"{middle:.0f} ({low:.0f} - {high:.0f})")
    console = Console()
    console.print(table)
    console.print(
        f"{in_words(about)}; "
        f"medians (quartiles) of {args.rounds} rounds, taken in turns, one thread; "
        "both sides draw the same masks"
    )
    if args.json:
        settings = {"batch_size": args.batch_size, "rounds": args.rounds, "views": VIEWS}
        args.json.write_text(
            json.dumps({"machine": about, "settings": settings, "masks_per_s": results}, indent=1)
        )


if __name__ == "__main__":
    main()
