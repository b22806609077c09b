"""Counter-based random numbers: equal to plain Python bit for bit, uniform, and independent."""

import random

import numpy as np
import pytest
from scipy import stats

from ibeton.pipeline.sampling import rng


def draws(seeds, epochs, indices, purposes, counters) -> np.ndarray:
    """Return float64 [...]: `uniform` over the broadcast arguments."""
    grid = np.broadcast_arrays(seeds, epochs, indices, purposes, counters)
    values = [
        rng.uniform(np.uint64(rng.sample_key(s, e, i, p)), c)
        for s, e, i, p, c in zip(*(a.ravel().tolist() for a in grid), strict=True)
    ]
    return np.array(values).reshape(grid[0].shape)


def test_equals_the_plain_python_twin_bit_for_bit():
    source = random.Random(0)
    edges = [0, 1, -1, 2**31, 2**32 - 1, 2**62, -(2**63), 2**63 - 1]
    cases = [source.choices(edges, k=4) for _ in range(500)]
    cases += [[source.randint(-(2**63), 2**63 - 1) for _ in range(4)] for _ in range(2000)]
    for case in cases:
        key = rng.sample_key(*case)
        assert key == rng.sample_key_reference(*case)
        counter, n = source.randint(0, 2**40), source.randint(1, 2**53)
        wrapped = np.uint64(key)
        assert rng.uniform(wrapped, counter) == rng.uniform_reference(key, counter)
        assert rng.randint(wrapped, counter, n) == rng.randint_reference(key, counter, n)


def test_first_outputs_are_those_of_splitmix64():
    # The generator's published first outputs for the state 1234567 (Vigna's reference in C).
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    golden = 0x9E3779B97F4A7C15
    assert [
        rng.mix_reference((1234567 + (i + 1) * golden) & rng.MASK_64) for i in range(3)
    ] == expected


@pytest.mark.parametrize("n", [1, 2, 3, 7, 14, 196, 2**32 + 1, 2**53 - 1, 2**53])
def test_integers_stay_below_n_at_both_ends_of_the_range(n):
    largest = 1.0 - 2.0**-53
    assert int(largest * n) == n - 1
    values = [rng.randint(np.uint64(5), c, n) for c in range(2000)]
    assert min(values) >= 0
    assert max(values) < n


@pytest.mark.parametrize("varied", ["seed", "epoch", "index", "purpose", "counter"])
def test_draws_are_uniform_and_independent_along_every_argument(varied):
    n = 40_000
    line = np.arange(n)
    args = {"seed": 0, "epoch": 0, "index": 0, "purpose": 0, "counter": 0, varied: line}
    values = draws(*args.values())
    observed = np.bincount((values * 256).astype(int), minlength=256)
    assert stats.chisquare(observed).pvalue > 1e-3
    pairs = np.bincount(
        (values[:-1] * 16).astype(int) * 16 + (values[1:] * 16).astype(int), minlength=256
    )
    assert stats.chisquare(pairs).pvalue > 1e-3
    centered = values - 0.5
    for lag in (1, 2, 3, 12, 256):
        correlation = 12 * np.mean(centered[:-lag] * centered[lag:])
        assert abs(correlation) < 4 / np.sqrt(n - lag)


def test_neighboring_seeds_epochs_indexes_purposes_and_counters_share_nothing():
    line = np.arange(8)
    grid = np.ix_(line, line, line, line, line)
    values = draws(*grid)
    assert len(np.unique(values)) == values.size
    for axis in range(5):
        centered = values - 0.5
        shifted = np.roll(centered, 1, axis=axis)
        assert abs(12 * np.mean(centered * shifted)) < 4 / np.sqrt(values.size)


def test_swapping_two_arguments_changes_the_key():
    keys = {rng.sample_key(*np.roll([1, 2, 3, 4], k).tolist()) for k in range(4)}
    assert len(keys) == 4


def test_purposes_with_their_views_do_not_meet():
    assert rng.AUGMENT + 255 < rng.MASK
