"""What all pictures share: views to look at, views to compute on, and a figure that is saved whole.

In shapes: B images, S their side in pixels, h x w patches of an image.
"""

import copy
import textwrap
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from ibeton.atomic import replacing
from ibeton.evaluation.photos import PhotoSet

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREEN, RED, INK = "#2f855a", "#c53030", "#333333"
TILE = 1.25  # inches that a small image takes
DPI = 150
_LETTERS = 14  # of a title, to an inch
LOOK = 224  # least side in pixels of a view to look at


def views_of(photos: PhotoSet, indices: Sequence[int]) -> Tensor:
    """Evaluation views uint8 [B, 3, S, S] of photos. Raises ValueError for a number that the set
    lacks, and for a photo that cannot be read."""
    views = []
    for index in indices:
        if not 0 <= index < len(photos):
            raise ValueError(
                f"--photos {index}: {photos.path} has photos 0 to {len(photos) - 1:,}; give one"
            )
        view, _, reason = photos[index]
        if view is None:
            raise ValueError(f"--photos {index} cannot be read ({reason}); give another")
        views.append(view)
    return torch.stack(views)


def to_look_at(photos: PhotoSet) -> PhotoSet:
    """The same set in views of a whole multiple of its size, large enough for the eye."""
    large = copy.copy(photos)
    large.size = photos.size * enlargement(photos.size)
    return large


def enlargement(size: int) -> int:
    """How many times larger a view of `size` pixels is shown."""
    return max(1, -(-LOOK // size))


def spread(photos: Sized, count: int) -> list[int]:
    """`count` photos at equal distances over the set, from the middle of each part."""
    count = min(count, len(photos))
    return [(2 * i + 1) * len(photos) // (2 * count) for i in range(count)]


def class_name(photos: PhotoSet, index: int) -> str:
    """The name of a photo's class, or its number where the set has no names."""
    label = int(photos.labels[index])
    return photos.classes[label] if photos.classes else f"class {label}"


def new_figure(rows: int, columns: int, tile: float = TILE) -> tuple[Figure, np.ndarray]:
    """A grid of axes [rows, columns] without ticks, for images of `tile` inches."""
    size = (columns * tile, rows * tile)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure, axes


def show(axis: Axes, image: Tensor | np.ndarray, title: str = "", **options: Any) -> None:
    """Draw uint8 [3, S, S], or a map [h, w]."""
    pixels = np.asarray(image)
    axis.imshow(pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels, **options)
    if title:
        axis.set_title(title, fontsize=8, color=INK, pad=3, parse_math=False)


def frame(axis: Axes, right: bool) -> None:
    """A green border around an image, red if it is not `right`."""
    axis.spines[:].set(visible=True, color=GREEN if right else RED, linewidth=2)


def save(figure: Figure, path: Path, title: str) -> None:
    """Write a PNG in one step, under its title."""
    lines = textwrap.wrap(title, int(_LETTERS * figure.get_figwidth()))
    figure.suptitle("\n".join(lines), fontsize=10, color=INK, parse_math=False)
    try:
        with replacing(path, suffix=".png") as partial:
            figure.savefig(partial, dpi=DPI)
    finally:
        plt.close(figure)
