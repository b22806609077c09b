"""Average precision of ranked lists, in the trapezoidal form of the landmark and copy benchmarks.

After Radenovic et al., "Revisiting Oxford and Paris" (CVPR 2018), and the Holidays and Copydays
evaluation before it: the area under precision over recall, by the trapezoidal rule. It is lower
than the usual average precision, which takes the value at the right end of each step.
"""

from collections.abc import Collection, Sequence

import numpy as np


def average_precision(ranks: Sequence[int] | np.ndarray, total: int) -> float:
    """Average precision in 0 .. 1 of a list whose positives stand at `ranks` (from 0, rising), with
    `total` positives in all; those that were not found count as missed."""
    ranks = np.asarray(ranks, dtype=np.float64)
    found = np.arange(len(ranks))
    before = np.divide(found, ranks, out=np.ones(len(ranks)), where=ranks > 0)
    after = (found + 1) / (ranks + 1)
    return float(((before + after) / 2).sum() / total)


def ranks_without_junk(
    order: np.ndarray, positives: Collection[int], junk: Collection[int]
) -> np.ndarray:
    """Where the positives stand, from 0, in `order` int64 [n] (photos, most similar first) after
    junk has been taken out: int64, rising."""
    kept = order[~np.isin(order, list(junk))]
    return np.flatnonzero(np.isin(kept, list(positives)))


def precision_at(ranks: np.ndarray, k: int) -> float:
    """Share of positives among the first k. As published, k is lowered to the last positive's place
    where that comes first."""
    k = min(k, int(ranks.max()) + 1)
    return float(np.count_nonzero(ranks < k) / k)
