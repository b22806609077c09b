"""The order of an epoch: a permutation by (seed, epoch), cut into global batches.

A global batch is one slice of the permutation, of which each rank takes its own part. So two ranks
with half the batch each see, step by step, what one rank with the whole batch sees.
"""

import numpy as np

from ibeton.command import amount


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation int64 [count] of the sample indices for one epoch. seed, epoch: below 2^64."""
    key = np.array([seed, epoch], np.uint64)  # without it, float64 from 2^63 on
    return np.random.Generator(np.random.Philox(key=key)).permutation(count)


def steps_per_epoch(count: int, batch_size: int, world_size: int) -> int:
    """Whole global batches in an epoch; the remaining photos are not used in it.

    Raises ValueError if there are too few photos for one global batch.
    """
    steps = count // (batch_size * world_size)
    if steps == 0:
        raise ValueError(
            f"--batch-size {batch_size} with {amount(world_size, 'process', 'processes')}"
            f" needs {batch_size * world_size} photos per step, but the data set has {count}: use"
            + (f" at most {most}" if (most := count // world_size) else " fewer processes")
        )
    return steps


def rank_batches(
    order: np.ndarray, batch_size: int, rank: int, world_size: int, first_step: int = 0
) -> np.ndarray:
    """This rank's batches, int64 [steps - first_step, batch_size]."""
    steps = steps_per_epoch(len(order), batch_size, world_size)
    used = order[: steps * batch_size * world_size].reshape(steps, world_size, batch_size)
    return used[first_step:, rank]
