"""What finds its like: patches of two views, or of two photos, that are each other's nearest by
the cosine of their tokens (iBOT, appendix)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.patches import ConnectionPatch
from PIL import Image
from torch import Tensor, nn

from ibeton.evaluation.frozen.features import evaluating, normalized
from ibeton.evaluation.photos import PhotoSet
from ibeton.evaluation.pictures.canvas import (
    GREEN,
    RED,
    class_name,
    enlargement,
    new_figure,
    save,
    show,
    to_look_at,
    views_of,
)
from ibeton.pipeline.crops import cut_view_reference
from ibeton.pipeline.sampling import ViewSpec, draw_views
from ibeton.pipeline.store import Photos

LINES = 12  # correspondences drawn
VIEW_SCALE = (0.4, 1.0)  # share of the photo that a view shows: two of them then overlap


@dataclass(frozen=True)
class Pair:
    """Two images and, if they are views of one photo, where the points of each lie in it."""

    images: Tensor  # uint8 [2, 3, S, S]
    large: Tensor  # the same to look at
    boxes: np.ndarray | None  # DRAW [2]
    titles: tuple[str, str]


def two_views(photos: PhotoSet, source: Photos, index: int, seed: int = 0) -> Pair:
    """Two crops of a photo, each flipped and its colors changed at random as in training;
    `source` has its pixels."""
    views_of(photos, [index])  # refuses what cannot be read
    image = Image.fromarray(source.pixels(index))
    spec = ViewSpec(photos.size, VIEW_SCALE, blur_p=0.0, solarize_p=0.0, gray_p=0.0)
    draws = draw_views([spec, spec], seed, 0, index, image.height, image.width)
    titles = (f"{class_name(photos, index)}, view 1", "view 2")
    large = _cut(image, draws, to_look_at(photos).size)
    return Pair(_cut(image, draws, photos.size), large, draws, titles)


def _cut(image: Image.Image, draws: np.ndarray, size: int) -> Tensor:
    """Views uint8 [2, 3, size, size]."""
    views = [np.array(cut_view_reference(image, draw, size)) for draw in draws]
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)


def two_photos(photos: PhotoSet, first: int, second: int) -> Pair:
    """The evaluation views of two photos."""
    both = [first, second]
    titles = (class_name(photos, first), class_name(photos, second))
    return Pair(views_of(photos, both), views_of(to_look_at(photos), both), None, titles)


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


def scattered(places: Tensor, columns: int, count: int) -> list[int]:
    """The first `count` of `places` that do not touch one that was taken before: numbers in it."""
    taken: list[tuple[int, int]] = []
    chosen = []
    for number, place in enumerate(places.tolist()):
        row, column = divmod(place, columns)
        if all(max(abs(row - r), abs(column - c)) > 1 for r, c in taken):
            taken.append((row, column))
            chosen.append(number)
        if len(chosen) == count:
            break
    return chosen


def in_photo(box: Any, points: np.ndarray, size: int) -> np.ndarray:
    """Points (x, y) [n, 2] of a view in pixels -> where they are in the photo. `box`: DRAW."""
    x, y = points.T
    if box["flip"]:
        x = size - x
    scale_x, scale_y = box["width"] / size, box["height"] / size
    return np.stack((box["left"] + x * scale_x, box["top"] + y * scale_y), axis=1)


def are_right(boxes: np.ndarray, points: list[np.ndarray], size: int, patch: int) -> np.ndarray:
    """Whether each pair of points shows one place of the photo, give or take a patch of the larger
    view: bool [n]."""
    first, second = (in_photo(box, p, size) for box, p in zip(boxes, points, strict=True))
    reach = patch / size * np.array((boxes["width"].max(), boxes["height"].max()))
    return (np.abs(first - second) <= reach).all(axis=1)


def draw_correspondence(
    backbone: nn.Module, pairs: list[Pair], patch: int, device: str, path: Path
) -> None:
    """A row for each pair of images, with lines between the surest correspondences."""
    figure, axes = new_figure(len(pairs), 2, tile=2.6)
    colors = [f"C{i % 10}" for i in range(LINES)]
    for row, pair in enumerate(pairs):
        with evaluating(backbone), torch.inference_mode():
            tokens = backbone(normalized(pair.images, device))[:, 1:].float().cpu()  # [2, N, C]
        size = pair.images.shape[3]
        columns = size // patch
        first, second, _ = mutual_nearest(*tokens)
        chosen = scattered(first, columns, LINES)
        points = [_middles(places[chosen], columns, patch) for places in (first, second)]
        note = f"{len(chosen)} of {len(first)} mutual pairs"
        if pair.boxes is not None:
            right = are_right(pair.boxes, points, size, patch)
            colors = [GREEN if ok else RED for ok in right]
            note = f"{right.sum()} of {len(chosen)} right"
        show(axes[row, 0], pair.large[0], pair.titles[0])
        show(axes[row, 1], pair.large[1], f"{pair.titles[1]}: {note}")
        points = [p * enlargement(size) for p in points]
        for start, end, color in zip(*points, colors, strict=False):
            line = ConnectionPatch(
                start, end, "data", "data", axesA=axes[row, 0], axesB=axes[row, 1], color=color
            )
            line.set(linewidth=1.2, alpha=0.9)
            figure.add_artist(line)
            for axis, point in zip(axes[row], (start, end), strict=True):
                axis.plot(*point, "o", color=color, markersize=3.5, markeredgecolor="white")
    save(figure, path, "Patches that are each other's nearest")


def _middles(places: Tensor, columns: int, patch: int) -> np.ndarray:
    """Places [n] -> the middles (x, y) of these patches in pixels, [n, 2]."""
    numbers = places.numpy()
    return (np.stack((numbers % columns, numbers // columns), axis=1) + 0.5) * patch
