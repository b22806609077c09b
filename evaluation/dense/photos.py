"""What both tasks do with photos: read, fit, and the colors of classes."""

from colorsys import hsv_to_rgb
from pathlib import Path

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ibeton.evaluation.frozen.features import normalized
from ibeton.evaluation.photos import opened_rgb, planes


def fitted(height: int, width: int, short: float, long: float) -> list[int]:
    """The largest size of the same shape with sides of at most `short` and `long`."""
    scale = min(long / max(height, width), short / min(height, width))
    return [max(1, int(side * scale + 0.5)) for side in (height, width)]


def read_photo(path: Path) -> Tensor:
    """uint8 [3, H, W]. Raises as `opened`."""
    return planes(opened_rgb(path))


def test_view(photo: Tensor, short: int, long: int) -> Tensor:
    """A photo uint8 [3, H, W], resized to fit both sides and normalized."""
    size = fitted(photo.shape[1], photo.shape[2], short, long)
    return normalized(F.resize(photo, size, antialias=False), "cpu")


def palette(count: int) -> np.ndarray:
    """A color for each class, uint8 [count + 1, 3], the last one black for unlabeled pixels:
    hues a golden section apart, in three strengths."""
    colors = [hsv_to_rgb(i * 0.618034 % 1, 0.75, (1.0, 0.75, 0.5)[i % 3]) for i in range(count)]
    return (255 * np.array([*colors, (0, 0, 0)])).round().astype(np.uint8)
