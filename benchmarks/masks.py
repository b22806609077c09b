"""Masks/s of the compiled sampler, a batch per call, against the plain Python reference.

`python benchmarks/masks.py` takes seconds on one core. Both sides draw the same masks; their
rounds take turns, so that a busy machine slows both. Compilation is not timed.
"""

import itertools

import numpy as np

from ibeton.benchmarks.harness import measure as harness
from ibeton.benchmarks.harness.measure import ratios, spread
from ibeton.command import run_or_exit
from ibeton.pipeline.sampling.masks import KeyDraws, MaskConfig, draw_mask_reference, draw_masks
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
        raise SystemExit(
            "the two samplers drew different masks; run tests/pipeline/sampling/test_masks.py"
        )
    sides = {
        "compiled": lambda: sum(compiled(next(epochs))[..., 0, 0].size for _ in range(REPEATS)),
        "reference": lambda: reference(next(epochs))[..., 0, 0].size,
    }
    return harness.take_turns(sides, rounds)


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=15)
    images = harness.integer(1)
    parser.add_argument("--batch-size", type=images, default=256, help="images per call")
    args = parser.parse_args()
    about, results = harness.machine("numba", "numpy"), {}
    title = f"thousand masks/s, {args.batch_size} images x {VIEWS} views per call"
    table = harness.figures("masks", "compiled", "reference", "ratio", title=title)
    for name, (shape, side, ratio, ratio_var) in CASES.items():
        config = MaskConfig(shape=shape, ratio=ratio, ratio_var=ratio_var)
        rates = results[name] = measure(config, side, args.batch_size, args.rounds)
        cells = [spread([rate / 1e3 for rate in side]) for side in rates.values()]
        table.add_row(name, *cells, spread(ratios(rates, "compiled", "reference")))
    console = plain_console()
    console.print(table)
    console.print("one thread; both sides draw the same masks")
    harness.conclude(console, about, args.rounds, args.json, masks_per_s=results)


if __name__ == "__main__":
    run_or_exit(main)
