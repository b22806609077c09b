"""What a photo costs the loader, measured on some photos of the set itself."""

import time
from dataclasses import dataclass

import numpy as np

from ibeton.pipeline import PipelineConfig
from ibeton.pipeline.loaders import LoaderKind
from ibeton.pipeline.sampling import draw_views
from ibeton.pipeline.store import Photos, UnreadablePhoto
from ibeton.training.forecast.projection import LoaderCost

_PHOTOS, _SECONDS = 24, 0.4  # at most
# Two workers gave 1.54 to 1.64 of one, where cores are halves of real ones (docs/results.md).
SHARED_CORES = 1.3


@dataclass(frozen=True)
class PhotoCost:
    """Of the mean photo: the loader's seconds, bytes as stored, bytes decoded."""

    loader: LoaderCost
    stored: float
    decoded: float


def photo_cost(
    photos: Photos, config: PipelineConfig, kind: LoaderKind, cut_here: bool
) -> PhotoCost:
    """One core's work for a photo, by a loader, in about half a second. `cut_here`: the CPU cuts
    the views. Raises ValueError where none of a few photos can be read."""
    views, rows = config.views(), []
    begin = time.perf_counter()
    for index in np.linspace(0, len(photos) - 1, min(_PHOTOS, len(photos))).astype(int).tolist():
        try:
            stored = len(photos.photo_bytes(index))  # from here on in memory
            start = time.perf_counter()
            pixels = kind.decode(photos, index)
        except UnreadablePhoto:
            continue
        decoded = cut = time.perf_counter()
        if cut_here:
            draws = draw_views(views, 0, 0, index, *pixels.shape[:2])
            kind.cut(pixels, draws, views, config.global_crops_number)
            cut = time.perf_counter()
        rows.append((decoded - start, cut - decoded, stored, pixels.nbytes))
        if time.perf_counter() - begin > _SECONDS and len(rows) > 2:
            break
    if not rows:
        raise ValueError("no photo of those looked at could be read")
    # The first one pays for what is loaded or compiled.
    decode, crop, size, decoded_size = np.mean(rows[1:] or rows, axis=0).tolist()
    return PhotoCost(LoaderCost(decode, crop), size, decoded_size)
