"""What a photo costs the loader, measured on some photos of the set itself."""

import time
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ibeton.pipeline.config import PipelineConfig
from ibeton.pipeline.crops.cpu import cut_views
from ibeton.pipeline.crops.reference import cut_views_reference
from ibeton.pipeline.sampling.draws import draw_views, stack_shape
from ibeton.pipeline.store.beton import JPG, BetonReader
from ibeton.pipeline.store.decode import UnreadablePhoto
from ibeton.pipeline.store.photos import Photos
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


def photo_cost(photos: Photos, config: PipelineConfig, kind: str, cut_here: bool) -> PhotoCost:
    """One core's work for a photo, by loader `kind` ("ffcv", "dali", "pil"), in about half a
    second. `cut_here`: the CPU cuts the views. Raises ValueError where none of a few photos can be
    read."""
    views, rows = config.views(), []
    first = config.global_crops_number
    stacks = [np.empty(stack_shape(some), np.uint8) for some in (views[:first], views[first:])]
    begin = time.perf_counter()
    for index in np.linspace(0, len(photos) - 1, min(_PHOTOS, len(photos))).astype(int).tolist():
        try:
            stored = len(photos.photo_bytes(index))  # from here on in memory
            start = time.perf_counter()
            pixels = _decode(photos, index, kind)
        except UnreadablePhoto:
            continue
        decoded = cut = time.perf_counter()
        if cut_here:
            draws = draw_views(views, 0, 0, index, *pixels.shape[:2])
            if kind == "pil":
                cut_views_reference(Image.fromarray(pixels), draws, [view.size for view in views])
            else:
                cut_views(pixels, draws, *stacks)
            cut = time.perf_counter()
        rows.append((decoded - start, cut - decoded, stored, pixels.nbytes))
        if time.perf_counter() - begin > _SECONDS and len(rows) > 2:
            break
    if not rows:
        raise ValueError("no photo of those looked at could be read")
    # The first one pays for what is loaded or compiled.
    decode, crop, size, decoded_size = np.mean(rows[1:] or rows, axis=0).tolist()
    return PhotoCost(LoaderCost(decode, crop), size, decoded_size)


def _decode(photos: Photos, index: int, kind: str) -> np.ndarray:
    """By libjpeg-turbo as FFCV calls it, or by Pillow."""
    if kind == "ffcv" and isinstance(photos, BetonReader) and photos.modes[index] == JPG:
        from ffcv.libffcv import imdecode  # an optional package, here for certain

        height, width = int(photos.heights[index]), int(photos.widths[index])
        pixels = np.empty((height, width, 3), np.uint8)
        jpeg = np.frombuffer(photos.photo_bytes(index), np.uint8)
        imdecode(jpeg, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
        return pixels
    return photos.pixels(index)
