"""Masks a second: the compiled sampler, a batch a call, against the plain Python reference.

`python benchmarks/masks.py` takes seconds on one core. Both sides draw the same masks; their
rounds take turns, so that a busy machine slows both. Compilation is not timed.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np

from ibeton.benchmarks.harness.measure import (
    figures,
    in_words,
    machine,
    ratios,
    spread,
    take_turns,
)
from ibeton.command import run_or_exit
from ibeton.pipeline.sampling import KeyDraws, MaskConfig, draw_mask_reference, draw_masks
from ibeton.progress import plain_console

VIEWS, REPEATS = 2, 20  # one compiled batch takes a millisecond, too short to time alone
# name -> shape, patches of one side, ratio, ratio_var
CASES = {
    "block, ViT 14 x 14": ("block", 14, (0.0, 0.3), (0.0, 0.2)),
    "rand, ViT 14 x 14": ("rand", 14, (0.0, 0.7), (0.0, 0.05)),
    "block, Swin 7 x 7": ("block", 7, (0.0, 0.3), (0.0, 0.2)),
}


def measure(config: MaskConfig, side: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """Masks/s of both samplers, one figure per round."""
    few = max(1, batch // 16)  # images of a reference round: it is 100 times slower and more
    grid, epochs = (side, side), itertools.count()

    def compiled(epoch: int) -> np.ndarray:
        return draw_masks(config, 0, epoch, np.arange(batch), VIEWS, grid)

    def reference(epoch: int) -> np.ndarray:
        draws = [[KeyDraws(0, epoch, i, view) for i in range(few)] for view in range(VIEWS)]
        return np.array([[draw_mask_reference(config, grid, d) for d in row] for row in draws])

    if not np.array_equal(compiled(0)[:, :few], reference(0)):
        raise SystemExit("the two samplers drew different masks; run tests/pipeline/test_masks.py")
    sides = {
        "compiled": lambda: sum(compiled(next(epochs))[..., 0, 0].size for _ in range(REPEATS)),
        "reference": lambda: reference(next(epochs))[..., 0, 0].size,
    }
    return take_turns(sides, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch-size", type=int, default=256, help="images a call")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each sampler")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    if args.batch_size < 1 or args.rounds < 2:
        parser.error("--batch-size must be at least 1 and --rounds at least 2")
    about, results = machine("numba", "numpy"), {}
    title = f"thousand masks/s, {args.batch_size} images x {VIEWS} views a call"
    table = figures("masks", "compiled", "reference", "ratio", title=title)
    for name, (shape, side, ratio, ratio_var) in CASES.items():
        config = MaskConfig(shape=shape, ratio=ratio, ratio_var=ratio_var)
        rates = results[name] = measure(config, side, args.batch_size, args.rounds)
        cells = [spread([rate / 1e3 for rate in side]) for side in rates.values()]
        table.add_row(name, *cells, spread(ratios(rates, "compiled", "reference")))
    console = plain_console()
    console.print(table)
    console.print(
        f"{in_words(about)}; medians (quartiles) of {args.rounds} rounds, taken in turns, one"
        " thread; both sides draw the same masks"
    )
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "masks_per_s": results}, indent=1))


if __name__ == "__main__":
    run_or_exit(main)
