"""What both tasks do with photos: read, fit, normalize, and the colors of classes."""

from colorsys import hsv_to_rgb
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ibeton.pipeline.store.decode import UnreadablePhoto, load_photo, to_rgb

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def opened(path: Path) -> Image.Image:
    """Raises ValueError or FileNotFoundError that names the file."""
    try:
        return load_photo(path.read_bytes())
    except UnreadablePhoto as reason:
        raise ValueError(f"{path} cannot be read: {reason}") from reason


def read_photo(path: Path) -> Tensor:
    """uint8 [3, H, W]. Raises as `opened`."""
    return torch.from_numpy(np.array(to_rgb(opened(path)))).permute(2, 0, 1)


def fitted(height: int, width: int, short: float, long: float) -> list[int]:
    """The largest size of the same shape with sides of at most `short` and `long`."""
    scale = min(long / max(height, width), short / min(height, width))
    return [max(1, int(side * scale + 0.5)) for side in (height, width)]


def normalized(image: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32, by ImageNet's mean and deviation."""
    return F.normalize(image.float() / 255, list(MEAN), list(STD))


def test_view(photo: Tensor, short: int, long: int) -> Tensor:
    """A photo uint8 [3, H, W], resized to fit both sides and normalized."""
    size = fitted(photo.shape[1], photo.shape[2], short, long)
    return normalized(F.resize(photo, size, antialias=False))


def palette(count: int) -> np.ndarray:
    """A color for each class, uint8 [count + 1, 3], the last one black for unlabeled pixels:
    hues a golden section apart, in three strengths."""
    colors = [hsv_to_rgb(i * 0.618034 % 1, 0.75, (1.0, 0.75, 0.5)[i % 3]) for i in range(count)]
    return (255 * np.array([*colors, (0, 0, 0)])).round().astype(np.uint8)
