"""Pictures of predictions beside the truth."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from ibeton.evaluation.pictures.canvas import INK, new_figure, show

WIDTH = 4.0  # inches of a panel
SMALL = 7  # points of names


def panels(photo: Tensor) -> tuple[Figure, list[Axes]]:
    """A figure of the photo uint8 [3, H, W], and its axes: bare, for truth, for prediction."""
    figure, axes = new_figure(1, 3)
    figure.set_size_inches(3 * WIDTH, WIDTH * photo.shape[1] / photo.shape[2] + 0.7)
    for axis, title in zip(axes[0], ("photo", "truth", "prediction"), strict=True):
        show(axis, photo, title)
    return figure, list(axes[0])


def legend(figure: Figure, colors: dict[str, Any]) -> None:
    """Names and colors (uint8 [3]) of what is in a figure, below it."""
    patches = [Patch(color=color / 255, label=name) for name, color in colors.items()]
    figure.legend(
        handles=patches, loc="outside lower center", ncols=8, fontsize=SMALL, frameon=False
    )


def objects(
    axis: Axes, boxes: Tensor, masks: Tensor, texts: list[str], colors: list[np.ndarray]
) -> None:
    """Boxes [n, 4] and masks [n, H, W] with a text each."""
    for box, mask, text, color in zip(
        boxes.tolist(), masks.bool().numpy(), texts, colors, strict=True
    ):
        left, top, right, bottom = box
        axis.imshow(mask[..., None] * np.append(color / 255, 0.35))  # transparent elsewhere
        side = (left, top), right - left, bottom - top
        axis.add_patch(Rectangle(*side, fill=False, edgecolor=color / 255, linewidth=1.2))
        under = {"facecolor": "white", "alpha": 0.75, "pad": 0.8, "edgecolor": "none"}
        axis.text(left, top, text, fontsize=SMALL, color=INK, bbox=under, va="bottom", clip_on=True)
