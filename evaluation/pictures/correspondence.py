"""What finds its like: patches of two views, or of two photos, that are each other's nearest by
the cosine of their tokens (iBOT, appendix)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.patches import ConnectionPatch
from PIL import Image
from torch import Tensor, nn

from ibeton.evaluation.frozen.features import check_finite, evaluating, normalized
from ibeton.evaluation.matching.views import are_right, cut_two, draw_two, middles, mutual_nearest
from ibeton.evaluation.photos import PhotoSet
from ibeton.evaluation.pictures import canvas

LINES = 12  # correspondences drawn


@dataclass(frozen=True)
class Pair:
    """Two images and, if they are views of one photo, where the points of each lie in it."""

    images: Tensor  # uint8 [2, 3, S, S]
    large: Tensor  # the same to look at
    boxes: np.ndarray | None  # DRAW [2]
    titles: tuple[str, str]


def two_views(photos: PhotoSet, index: int, seed: int = 0) -> Pair:
    """Two crops of a photo, each flipped and its colors changed at random as in training."""
    canvas.views_of(photos, [index])  # refuses what cannot be read
    image = Image.fromarray(photos.photos.pixels(index))
    draws = draw_two(image, photos.size, index, seed)
    titles = (f"{canvas.class_name(photos, index)}, view 1", "view 2")
    large = cut_two(image, draws, canvas.to_look_at(photos).size)
    return Pair(cut_two(image, draws, photos.size), large, draws, titles)


def two_photos(photos: PhotoSet, first: int, second: int) -> Pair:
    """The evaluation views of two photos."""
    both = [first, second]
    titles = (canvas.class_name(photos, first), canvas.class_name(photos, second))
    large = canvas.views_of(canvas.to_look_at(photos), both)
    return Pair(canvas.views_of(photos, both), large, None, titles)


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


def draw_correspondence(
    backbone: nn.Module, pairs: list[Pair], patch: int, device: str, path: Path
) -> None:
    """A row for each pair of images, with lines between the surest correspondences."""
    figure, axes = canvas.new_figure(len(pairs), 2, tile=2.6)
    colors = [f"C{i % 10}" for i in range(LINES)]
    for row, pair in enumerate(pairs):
        with evaluating(backbone), torch.inference_mode():
            tokens = backbone(normalized(pair.images, device))[:, 1:].float().cpu()  # [2, N, C]
        check_finite(tokens)
        size = pair.images.shape[3]
        columns = size // patch
        first, second, _ = mutual_nearest(*tokens)
        chosen = scattered(first, columns, LINES)
        points = [middles(places[chosen], columns, patch) for places in (first, second)]
        note = f"{len(chosen)} of {len(first)} mutual pairs"
        if pair.boxes is not None:
            right = are_right(pair.boxes, points, size, patch)
            colors = [canvas.GREEN if ok else canvas.RED for ok in right]
            note = f"{right.sum()} of {len(chosen)} right"
        canvas.show(axes[row, 0], pair.large[0], pair.titles[0])
        canvas.show(axes[row, 1], pair.large[1], f"{pair.titles[1]}: {note}")
        points = [p * canvas.enlargement(size) for p in points]
        for start, end, color in zip(*points, colors, strict=False):
            line = ConnectionPatch(
                start, end, "data", "data", axesA=axes[row, 0], axesB=axes[row, 1], color=color
            )
            line.set(linewidth=1.2, alpha=0.9)
            figure.add_artist(line)
            for axis, point in zip(axes[row], (start, end), strict=True):
                axis.plot(*point, "o", color=color, markersize=3.5, markeredgecolor="white")
    canvas.save(figure, path, "Patches that are each other's nearest")
