"""Average precision of ranked lists: worked by hand, and against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from ibeton.evaluation.matching.precision import (
    average_precision,
    precision_at,
    ranks_without_junk,
)


def test_average_precision_by_hand():
    assert average_precision([0], 1) == 1
    assert average_precision([1], 1) == (0 / 1 + 1 / 2) / 2
    # places 0 and 2 of three: (1 + 1) / 2 and (1/2 + 2/3) / 2, half of the recall each
    assert average_precision([0, 2], 2) == pytest.approx((1 + 7 / 12) / 2)
    assert average_precision([0, 2], 4) == pytest.approx((1 + 7 / 12) / 4), "two were not found"
    assert average_precision([], 3) == 0


def test_average_precision_is_the_area_under_the_polygon_of_precision_over_recall():
    """scikit-learn's figure is the same area by the right ends of the steps: the left ends, which
    are the precisions one place earlier, make up the other half."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        relevant = rng.random(60) < 0.3
        ranks = np.flatnonzero(relevant)
        right = average_precision_score(relevant, -np.arange(60.0))
        hits = relevant.cumsum()
        left = np.mean([hits[r - 1] / r if r else 1.0 for r in ranks])
        assert average_precision(ranks, len(ranks)) == pytest.approx((left + right) / 2)


def test_junk_is_taken_out_of_the_list():
    order = np.array([4, 7, 1, 0, 9, 2, 3])
    assert ranks_without_junk(order, {1, 9}, {7}).tolist() == [1, 3]
    assert ranks_without_junk(order, {1, 9}, set()).tolist() == [2, 4]
    assert ranks_without_junk(order, {4}, {0, 1, 7}).tolist() == [0]


def test_precision_counts_to_the_last_positive_at_most():
    assert precision_at(np.array([0, 1, 5]), 5) == 2 / 5
    assert precision_at(np.array([0, 1]), 10) == 1
    assert precision_at(np.array([2]), 1) == 0
