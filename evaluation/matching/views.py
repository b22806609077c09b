"""Two views of a photo, and where the patches of each lie in it."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ibeton.pipeline.crops.reference import cut_view_reference
from ibeton.pipeline.sampling.draws import ViewSpec, draw_views

VIEW_SCALE = (0.4, 1.0)  # share of the photo that a view shows: two of them then overlap


def draw_two(image: Image.Image, size: int, index: int, seed: int = 0) -> np.ndarray:
    """What two crops of photo `index` show, each flipped and its colors changed at random as in
    training: DRAW [2]."""
    spec = ViewSpec(size, VIEW_SCALE, blur_p=0.0, solarize_p=0.0, gray_p=0.0)
    return draw_views([spec, spec], seed, 0, index, image.height, image.width)


def cut_two(image: Image.Image, draws: np.ndarray, size: int) -> Tensor:
    """Views uint8 [2, 3, size, size]."""
    views = [np.array(cut_view_reference(image, draw, size)) for draw in draws]
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)


def middles(places: Tensor, columns: int, patch: int) -> np.ndarray:
    """Places [n] -> the middles (x, y) of these patches in pixels, [n, 2]."""
    numbers = places.numpy()
    return (np.stack((numbers % columns, numbers // columns), axis=1) + 0.5) * patch


def in_photo(box: Any, points: np.ndarray, size: int) -> np.ndarray:
    """Points (x, y) [n, 2] of a view in pixels -> where they are in the photo. `box`: DRAW."""
    x, y = points.T
    if box["flip"]:
        x = size - x
    scale_x, scale_y = box["width"] / size, box["height"] / size
    return np.stack((box["left"] + x * scale_x, box["top"] + y * scale_y), axis=1)


def in_view(box: Any, points: np.ndarray, size: int) -> np.ndarray:
    """The reverse of `in_photo`: points of the photo -> where they are in a view, inside or out."""
    x = (points[:, 0] - box["left"]) * size / box["width"]
    y = (points[:, 1] - box["top"]) * size / box["height"]
    return np.stack((size - x if box["flip"] else x, y), axis=1)


def are_right(boxes: np.ndarray, points: list[np.ndarray], size: int, patch: int) -> np.ndarray:
    """Whether each pair of points shows one place of the photo, give or take a patch of the larger
    view: bool [n]."""
    first, second = (in_photo(box, p, size) for box, p in zip(boxes, points, strict=True))
    reach = patch / size * np.array((boxes["width"].max(), boxes["height"].max()))
    return (np.abs(first - second) <= reach).all(axis=1)


def mutual_nearest(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patches [N, C] and [N, C] -> places int64 [m] in both, and cosines [m], falling, of those
    that are each other's nearest."""
    cosines = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T  # [N, N]
    forth, back = cosines.argmax(dim=1), cosines.argmax(dim=0)
    places = torch.arange(len(first))
    mutual = places[back[forth] == places]
    order = cosines[mutual, forth[mutual]].argsort(descending=True, stable=True)
    mutual = mutual[order]
    return mutual, forth[mutual], cosines[mutual, forth[mutual]]
