"""The order of an epoch stays what it was, and every seed has its own."""

import pytest

from ibeton.pipeline.sampling.order import epoch_order


@pytest.mark.parametrize(
    ("seed", "epoch", "order"),
    [
        (0, 0, [5, 0, 6, 1, 7, 2, 4, 3]),
        (5, 3, [0, 6, 5, 7, 4, 3, 1, 2]),
        (2**63 - 1, 800, [7, 5, 6, 3, 1, 4, 2, 0]),
    ],
)
def test_an_order_is_that_of_earlier_versions(seed: int, epoch: int, order: list[int]) -> None:
    assert epoch_order(8, seed, epoch).tolist() == order


def test_nearby_large_seeds_give_different_orders() -> None:
    seeds = (2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1)
    orders = [tuple(epoch_order(100, seed, 1)) for seed in seeds]
    assert len(set(orders)) == len(seeds)
