"""Which sample stands where in an epoch: a permutation by (seed, epoch), cut into global batches.

Each global batch is one slice of the permutation and each rank takes its own part of that slice. So
two ranks with half the batch each see, step by step, what one rank with all of it sees.
"""

import numpy as np


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation int64 [count] of the sample indices for one epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def steps_per_epoch(count: int, batch_size: int, world_size: int) -> int:
    """Whole global batches in an epoch; what is left over waits for another epoch's order.

    Raises ValueError where not even one global batch can be filled.
    """
    steps = count // (batch_size * world_size)
    if steps == 0:
        raise ValueError(
            f"--batch-size {batch_size} on {world_size} process(es) asks for more photos than the"
            f" data set has ({count}); choose at most {count // world_size}"
        )
    return steps


def rank_batches(
    order: np.ndarray, batch_size: int, rank: int, world_size: int, first_step: int = 0
) -> np.ndarray:
    """This rank's batches, int64 [steps - first_step, batch_size]."""
    steps = steps_per_epoch(len(order), batch_size, world_size)
    used = order[: steps * batch_size * world_size].reshape(steps, world_size, batch_size)
    return used[first_step:, rank]
