"""J and F against hand-worked figures and against vos-benchmark."""

import numpy as np
import pytest

from ibeton.evaluation.matching.video_metrics import (
    boundary_f,
    mean_scores,
    object_scores,
    region_similarity,
)


def blobs(rng: np.random.Generator, shape: tuple[int, int], objects: int) -> np.ndarray:
    """Object numbers of overlapping ellipses, some over the edge."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    mask = np.zeros(shape, np.uint8)
    for number in range(1, objects + 1):
        center, axes = rng.uniform(0, 1, 2) * shape, rng.uniform(6, 25, 2)
        inside = ((y - center[0]) / axes[0]) ** 2 + ((x - center[1]) / axes[1]) ** 2 < 1
        mask[inside] = number
    return mask


def test_region_similarity_of_two_squares():
    first, second = np.zeros((2, 20, 20), bool)
    first[2:8, 2:8] = second[2:8, 5:11] = True
    assert region_similarity(first, second) == 18 / (36 + 36 - 18)
    assert region_similarity(first, first) == 1
    assert region_similarity(first & False, second & False) == 1
    assert region_similarity(first, second & False) == 0


def test_a_boundary_counts_as_found_up_to_the_tolerance():
    """In 480 x 640 pixels the tolerance is ceil(0.008 * 800) = 7."""
    mask = np.zeros((480, 640), bool)
    mask[100:300, 100:300] = True
    near, far = np.zeros_like(mask), np.zeros_like(mask)
    near[107:307, 100:300] = True
    far[100:300, 320:520] = True
    assert boundary_f(near, mask) == 1
    assert boundary_f(far, mask) == 0
    shifted = np.zeros_like(mask)
    shifted[108:308, 100:300] = True  # one more: upper and lower edge are missed, apart from ends
    assert 0.5 < boundary_f(shifted, mask) < 0.6
    assert boundary_f(mask & False, mask) == 0
    assert boundary_f(mask & False, mask & False) == 1


def test_the_truth_scores_100_and_each_object_counts_once():
    rng = np.random.default_rng(0)
    true = [blobs(rng, (60, 80), 3) for _ in range(4)]
    assert mean_scores(list(object_scores(true, true).values())) == {
        "jf_mean": 100,
        "j_mean": 100,
        "f_mean": 100,
    }
    assert mean_scores([(100, 50), (0, 10)]) == {"jf_mean": 40, "j_mean": 50, "f_mean": 30}


def test_void_counts_for_nothing_and_255_alone_is_an_object():
    true = np.zeros((40, 40), np.uint8)
    true[5:15, 5:15], true[20:30, 20:30], true[5:15, 15:25] = 1, 2, 255
    guess = true.copy()
    guess[true == 255] = 1
    assert object_scores([guess], [true]) == {1: (100, 100), 2: (100, 100)}
    alone = np.where(true == 1, 255, 0).astype(np.uint8)
    assert object_scores([alone], [alone]) == {255: (100, 100)}


def test_random_masks_score_as_in_vos_benchmark():
    evaluator = pytest.importorskip(
        "vos_benchmark.evaluator", reason="pip install vos-benchmark"
    ).Evaluator()
    rng = np.random.default_rng(1)
    true = [blobs(rng, (120, 160), 4) for _ in range(6)]
    guesses = [np.roll(mask, rng.integers(-6, 7, 2), (0, 1)) for mask in true]
    guesses[2][guesses[2] == 3] = 0  # an object that is lost
    numbers = set(np.unique(true)) - {0}
    first = next(i for i, mask in enumerate(true) if numbers <= set(mask.flat))
    true[0], true[first] = true[first], true[0]  # it counts an object from its first frame on
    guesses[0], guesses[first] = guesses[first], guesses[0]
    for guess, truth in zip(guesses, true, strict=True):
        evaluator.feed_frame(guess, truth)
    j, f = evaluator.conclude()
    found = object_scores(guesses, true)
    assert len(found) == 4
    assert {n: s[0] for n, s in found.items()} == pytest.approx(j)
    assert {n: s[1] for n, s in found.items()} == pytest.approx(f)
    assert min(j.values()) < 90
