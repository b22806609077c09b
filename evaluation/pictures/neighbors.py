"""The photos that lie nearest, by the cosine of class tokens after the last block."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ibeton.evaluation.frozen.features import Extraction, check_read, collect, feature_batches
from ibeton.evaluation.frozen.knn import find_neighbors
from ibeton.evaluation.photos import PhotoSet
from ibeton.evaluation.pictures import canvas


def nearest(
    backbone: nn.Module, photos: PhotoSet, queries: list[int], count: int, how: Extraction
) -> tuple[np.ndarray, np.ndarray]:
    """Of each query, a photo of the set, the nearest others: indices int64 [q, count] and cosines
    float32 [q, count], falling. Raises ValueError for fewer than `count` others."""
    batches = feature_batches(backbone, photos, ("cls",), range(len(photos)), how)
    arrays, indices = collect(batches, len(photos), lambda _, shape, dtype: np.empty(shape, dtype))
    check_read(photos, len(indices))
    if count >= len(indices):
        raise ValueError(f"--neighbors {count}: {photos.path} has {len(indices)} readable photos")
    features = F.normalize(torch.from_numpy(arrays["cls"]), dim=1)
    rows = np.searchsorted(indices, queries)
    _, found = find_neighbors(features, features[rows], count + 1)
    others = [row[row != own][:count] for row, own in zip(found.numpy(), rows, strict=True)]
    kept = np.stack(others)
    similar = (features[rows].unsqueeze(1) * features[kept]).sum(dim=2).numpy()
    return indices[kept], similar


def draw_neighbors(
    backbone: nn.Module,
    photos: PhotoSet,
    queries: list[int],
    count: int,
    how: Extraction,
    path: Path,
) -> None:
    """A row for each query: the photo, then its nearest; frames tell whether the class is its."""
    large = canvas.to_look_at(photos)
    images = canvas.views_of(large, queries)
    found, cosines = nearest(backbone, photos, queries, count, how)
    figure, axes = canvas.new_figure(len(queries), 1 + count)
    for row, query in enumerate(queries):
        canvas.show(axes[row, 0], images[row], f"query: {canvas.class_name(photos, query)}")
        for column, view in enumerate(canvas.views_of(large, found[row].tolist()), start=1):
            index, axis = int(found[row, column - 1]), axes[row, column]
            canvas.show(
                axis, view, f"{canvas.class_name(photos, index)} {cosines[row, column - 1]:.3f}"
            )
            canvas.frame(axis, photos.labels[index] == photos.labels[query])
    own = np.mean(photos.labels[found] == photos.labels[queries][:, None])
    canvas.save(
        figure,
        path,
        f"Nearest photos by class token, with cosine; {100 * own:.0f} % are of the query's class",
    )
