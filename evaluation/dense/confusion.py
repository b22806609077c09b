"""Segmentation scores from one confusion matrix over the whole set, as ADE20K is scored."""

import numpy as np
import torch
from torch import Tensor


def confusion(truth: Tensor, predicted: Tensor, classes: int, ignored: int) -> Tensor:
    """int64 [K, K], rows are true classes. Pixels whose truth is `ignored` do not count."""
    counted = truth != ignored
    pairs = truth[counted].long() * classes + predicted[counted].long()
    return torch.bincount(pairs.flatten(), minlength=classes**2).view(classes, classes)


def scores(matrix: np.ndarray, names: list[str]) -> dict[str, float]:
    """mIoU, mAcc (means over classes) and aAcc (over pixels) in percent, "majority_miou" of
    answering the most frequent class everywhere, and "iou/NAME" of each class.

    A class that occurs neither in truth nor in predictions has no IoU, one that does not occur in
    truth no accuracy; means leave them out. Raises ValueError where no pixel counts.
    """
    if not matrix.any():
        raise ValueError("no pixel of the photos to evaluate on has a label")
    matrix = matrix.astype(np.float64)
    right, true, said = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    union = true + said - right
    iou = np.divide(100 * right, union, out=np.full_like(right, np.nan), where=union > 0)
    accuracy = np.divide(100 * right, true, out=np.full_like(right, np.nan), where=true > 0)
    result = {
        "miou": np.nanmean(iou),
        "macc": np.nanmean(accuracy),
        "aacc": 100 * right.sum() / matrix.sum(),
        "majority_miou": 100 * true.max() / true.sum() / (true > 0).sum(),
    }
    result |= {f"iou/{n}": v for n, v in zip(names, iou, strict=True) if not np.isnan(v)}
    return {name: float(value) for name, value in result.items()}
