"""The nearest photos before and after training, and where the class token looks after it."""

from pathlib import Path

import numpy as np
from torch import nn

from ibeton.evaluation.frozen.features import Extraction, normalized
from ibeton.evaluation.photos import PhotoSet
from ibeton.evaluation.pictures import canvas
from ibeton.evaluation.pictures.attention import class_attention
from ibeton.evaluation.pictures.neighbors import nearest


def draw_learned(
    untrained: nn.Module,
    trained: nn.Module,
    photos: PhotoSet,
    queries: list[int],
    count: int,
    how: Extraction,
    path: Path,
) -> None:
    """A row for each query: the photo, its `count` nearest before and after training, and the
    attention of the trained class token, mean of the heads. Frames tell whether the class is the
    query's. Raises ValueError for a Swin, which has no class token."""
    large = canvas.to_look_at(photos)
    images = canvas.views_of(large, queries)
    attention = class_attention(trained, normalized(canvas.views_of(photos, queries), how.device))
    figure, axes = canvas.new_figure(len(queries), 2 * count + 2)
    for row, query in enumerate(queries):
        canvas.show(axes[row, 0], images[row], canvas.class_name(photos, query))
        canvas.show(axes[row, -1], attention[row].mean(dim=0), cmap="magma", vmin=0)
    right = []
    for first, network in ((1, untrained), (1 + count, trained)):
        found, _ = nearest(network, photos, queries, count, how)
        same = photos.labels[found] == photos.labels[queries][:, None]
        right.append(f"{100 * np.mean(same):.0f} %")
        for row in range(len(queries)):
            for column, view in enumerate(canvas.views_of(large, found[row].tolist())):
                canvas.show(axes[row, first + column], view)
                canvas.frame(axes[row, first + column], same[row, column])
    axes[0, 1].set_title("before", fontsize=8, loc="left")
    axes[0, 1 + count].set_title("after", fontsize=8, loc="left")
    axes[0, -1].set_title("attention", fontsize=8)
    canvas.save(
        figure,
        path,
        f"The {count} nearest photos by class token, before training ({right[0]} of the query's"
        f" class, green) and after ({right[1]})",
    )
