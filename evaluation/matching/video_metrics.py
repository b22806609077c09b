"""J and F of DAVIS-2017: how well predicted object masks overlap the true ones, and how well their
boundaries agree.

After Perazzi et al., "A benchmark dataset and evaluation methodology for video object segmentation"
(CVPR 2016) and Pont-Tuset et al., "The 2017 DAVIS challenge" (arXiv 1704.00675).
"""

from collections.abc import Sequence

import numpy as np
from scipy.spatial import KDTree

TOLERANCE = 0.008  # distance between matching boundaries, as a part of the image's diagonal
VOID = 255  # pixels that count for nothing, where a sequence has other objects


def region_similarity(predicted: np.ndarray, true: np.ndarray) -> float:
    """J: intersection over union of two masks, bool [H, W]; 1 where both are empty."""
    union = np.count_nonzero(predicted | true)
    return np.count_nonzero(predicted & true) / union if union else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask bool [H, W] that differ from the next one to the right, below or both, as
    bool [H, W]; the benchmark's own definition, which the last row and column follow along the edge
    alone."""
    padded = np.pad(mask, ((0, 1), (0, 1)))
    right, below, both = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    edge = (mask ^ right) | (mask ^ below) | (mask ^ both)
    edge[-1] = mask[-1] ^ right[-1]
    edge[:, -1] = mask[:, -1] ^ below[:, -1]
    edge[-1, -1] = False
    return edge


def boundary_f(predicted: np.ndarray, true: np.ndarray) -> float:
    """F: harmonic mean of precision and recall of the boundary pixels of masks bool [H, W]. A pixel
    counts as found if the other boundary comes within 0.8 % of the diagonal, rounded up."""
    points = [np.argwhere(boundary(mask)) for mask in (predicted, true)]
    if not len(points[0]) or not len(points[1]):
        return float(len(points[0]) == len(points[1]))
    reach = np.ceil(TOLERANCE * np.linalg.norm(true.shape))
    precision = _share_within(points[0], points[1], reach)
    recall = _share_within(points[1], points[0], reach)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _share_within(points: np.ndarray, others: np.ndarray, reach: float) -> float:
    """The share of `points` that have one of `others` within `reach`, inclusive."""
    limit = np.nextafter(reach, np.inf)  # KDTree's own limit is exclusive
    distances, _ = KDTree(others).query(points, distance_upper_bound=limit)
    return float(np.isfinite(distances).mean())


def object_scores(
    predicted: Sequence[np.ndarray], true: Sequence[np.ndarray]
) -> dict[int, tuple[float, float]]:
    """J and F in percent of each object of a sequence, means over its frames.

    predicted, true: object numbers uint8 [H, W] of the frames that count, 0 where there is none.
    Where 255 stands beside other objects, those pixels count for nothing.
    """
    numbers = sorted(set(np.unique(np.stack(true)).tolist()) - {0})
    void = VOID if len(numbers) > 1 and VOID in numbers else None
    scores: dict[int, tuple[float, float]] = {}
    for number in numbers:
        if number == void:
            continue
        by_frame = []
        for guess, truth in zip(predicted, true, strict=True):
            masks = [one == number for one in (guess, truth)]
            if void is not None:
                masks = [mask & (truth != void) for mask in masks]
            by_frame.append((region_similarity(*masks), boundary_f(*masks)))
        j, f = 100 * np.mean(by_frame, axis=0)
        scores[number] = (float(j), float(f))
    return scores


def mean_scores(objects: Sequence[tuple[float, float]]) -> dict[str, float]:
    """J, F and their mean over the objects of all sequences, each object counting once."""
    j, f = np.mean(objects, axis=0)
    return {"jf_mean": float((j + f) / 2), "j_mean": float(j), "f_mean": float(f)}
