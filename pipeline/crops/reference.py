"""The published augmentation in Pillow's and torchvision's own operations, fed with our draws.

The plain reference of `cpu.py` and of the GPU croppers, and what the `pil` loader runs.
"""

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from ibeton.pipeline.sampling.draws import BRIGHTNESS, CONTRAST, HUE, JITTER_ORDERS, SATURATION

_ADJUST = {
    BRIGHTNESS: lambda image, draw: F.adjust_brightness(image, float(draw["brightness"])),
    CONTRAST: lambda image, draw: F.adjust_contrast(image, float(draw["contrast"])),
    SATURATION: lambda image, draw: F.adjust_saturation(image, float(draw["saturation"])),
    # A strength of 0 is off, as in torchvision's ColorJitter: HSV and back would change bytes.
    HUE: lambda image, draw: F.adjust_hue(image, float(draw["hue"])) if draw["hue"] else image,
}


def cut_view_reference(photo: Image.Image, draw: np.void, size: int) -> Image.Image:
    """One finished view [size, size] of an RGB `photo`; `draw` is a DRAW record."""
    top, left, height, width = (int(draw[k]) for k in ("top", "left", "height", "width"))
    view = F.resized_crop(photo, top, left, height, width, [size, size], InterpolationMode.BICUBIC)
    if draw["flip"]:
        view = F.hflip(view)
    if draw["jitter"]:
        for op in JITTER_ORDERS[draw["order"]]:
            view = _ADJUST[int(op)](view, draw)
    if draw["gray"]:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    if draw["blur_radius"] > 0:
        view = view.filter(ImageFilter.GaussianBlur(radius=float(draw["blur_radius"])))
    if draw["solarize"]:
        view = ImageOps.solarize(view, threshold=128)
    return view


def cut_views_reference(
    photo: Image.Image, draws: np.ndarray, sizes: list[int]
) -> list[np.ndarray]:
    """All views of one photo, each uint8 [S, S, 3]; `draws` DRAW [V], `sizes` in pixels [V]."""
    return [
        np.asarray(cut_view_reference(photo, draw, size))
        for draw, size in zip(draws, sizes, strict=True)
    ]
