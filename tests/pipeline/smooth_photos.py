"""A photo to test with."""

import numpy as np
from PIL import Image


def smooth_photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Coarse noise, enlarged: has edges, gradients and color at every place."""
    coarse = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
