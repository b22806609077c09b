"""Decoded pixels + draws -> finished views, on the CPU, compiled, without the GIL.

Every operation computes what Pillow computes, so the views are equal. `reference.py` does the same
with Pillow's and torchvision's own operations, and tests/pipeline/crops compares the two.
"""

import numpy as np

from ibeton.pipeline.compiled import compiled
from ibeton.pipeline.crops import blur, resize
from ibeton.pipeline.crops import color as color
from ibeton.pipeline.sampling.draws import BRIGHTNESS, CONTRAST, HUE, JITTER_ORDERS, SATURATION

Array = np.ndarray


@compiled
def cut_views(pixels: Array, draws: Array, global_out: Array, local_out: Array) -> None:
    """All views of one photo uint8 [H, W, 3]: `draws` DRAW [V + L] into global_out uint8
    [V, 3, S, S] and local_out uint8 [L, 3, s, s]."""
    columns = resize.photo_columns(pixels)
    views = global_out.shape[0]
    # A single call site each, as every call site is compiled inline.
    for v in range(len(draws)):
        out = global_out[v] if v < views else local_out[v - views]
        draw = draws[v]
        resize.resized_crop(columns, draw.top, draw.left, draw.height, draw.width, draw.flip, out)
        flat = out.reshape(3, -1)
        if draw.jitter:
            for op in JITTER_ORDERS[draw.order]:
                if op == BRIGHTNESS:
                    color.adjust_brightness(flat, draw.brightness)
                elif op == CONTRAST:
                    color.adjust_contrast(flat, draw.contrast)
                elif op == SATURATION:
                    color.adjust_saturation(flat, draw.saturation)
                elif op == HUE and draw.hue != 0:  # a strength of 0 is off, as in torchvision
                    color.adjust_hue(flat, draw.hue)
        if draw.gray:
            color.to_gray(flat)
        if draw.blur_radius > 0:
            blur.gaussian_blur(out, draw.blur_radius)
        if draw.solarize:
            color.solarize(flat)
