"""Every random number of one sample's augmentation, from (seed, epoch, sample index) alone.

The distributions are the published recipe's (iBOT, appendix A; torchvision's RandomResizedCrop and
ColorJitter). Drawing them apart from the pixels lets any executor (numba, Pillow, Triton) cut the
same crops, whatever the worker count, batch size, rank or device.
"""

from dataclasses import astuple, dataclass
from itertools import permutations
from typing import Any

import numpy as np

from ibeton.pipeline.compiled import compiled
from ibeton.pipeline.sampling.rng import AUGMENT, randint, sample_key, uniform

# One view's draws. The box is in pixels of the stored photo; `order` is a row of JITTER_ORDERS;
# blur_radius 0 means no blur.
DRAW = np.dtype(
    [(name, "i4") for name in ("top", "left", "height", "width")]
    + [(name, "u1") for name in ("flip", "jitter", "order", "gray", "solarize")]
    + [(name, "f4") for name in ("brightness", "contrast", "saturation", "hue", "blur_radius")],
    align=True,
)

BRIGHTNESS, CONTRAST, SATURATION, HUE = 0, 1, 2, 3
JITTER_ORDERS = np.array(list(permutations(range(4))), np.uint8)  # [24, 4], what `order` selects

_LOG_ASPECT = float(np.log(4 / 3))  # aspects lie in 3/4 .. 4/3, uniform in the logarithm
_ASPECT_MIN, _ASPECT_MAX = 3 / 4, 4 / 3
_BOX_DRAWS = 100  # counter of the first draw of a box; the other operations have 0 to 10


@dataclass(frozen=True)
class ViewSpec:
    """How one view is augmented. Defaults are those that all published views share."""

    size: int
    scale: tuple[float, float]
    blur_p: float
    solarize_p: float
    flip_p: float = 0.5
    jitter_p: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray_p: float = 0.2
    blur_radius: tuple[float, float] = (0.1, 2.0)


# A view's spec as the compiled samplers read it; ranges become two numbers.
SPEC = np.dtype(
    [
        (name + end, "f8")
        for name in ViewSpec.__dataclass_fields__
        if name != "size"
        for end in (("_min", "_max") if name in ("scale", "blur_radius") else ("",))
    ]
)


def published_views(
    global_crops: int,
    local_crops: int,
    global_size: int,
    local_size: int,
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
    **shared: Any,
) -> list[ViewSpec]:
    """The published views: the first global one always blurred, the others seldom blurred but
    sometimes solarized, the local ones blurred half of the time. `shared`: what else all views of a
    recipe have in common."""
    first = ViewSpec(global_size, global_scale, 1.0, 0.0, **shared)
    others = ViewSpec(global_size, global_scale, 0.1, 0.2, **shared)
    local = ViewSpec(local_size, local_scale, 0.5, 0.0, **shared)
    return [first] + [others] * (global_crops - 1) + [local] * local_crops


def stack_shape(views: list[ViewSpec]) -> tuple[int, int, int, int]:
    """Shape [V, 3, S, S] of views of one size, cut from one photo; also of none at all."""
    size = views[0].size if views else 1
    return len(views), 3, size, size


def spec_table(views: list[ViewSpec]) -> np.ndarray:
    """SPEC records [V] of the views."""
    rows = [tuple(np.hstack(astuple(view)[1:])) for view in views]
    return np.array(rows, dtype=SPEC)


@compiled
def draw_box(
    key: int, counter: int, height: int, width: int, scale_min: float, scale_max: float
) -> tuple[int, int, int, int]:
    """Random resized crop: ten tries at an area and an aspect that fit, then a center crop.

    Returns (top, left, height, width). Rounding is half to even, as Python's round is.
    """
    area = float(height * width)
    for _ in range(10):
        target = area * (scale_min + (scale_max - scale_min) * uniform(key, counter))
        aspect = np.exp(_LOG_ASPECT * (2.0 * uniform(key, counter + 1) - 1.0))
        counter += 2
        w = int(np.rint(np.sqrt(target * aspect)))
        h = int(np.rint(np.sqrt(target / aspect)))
        if 0 < w <= width and 0 < h <= height:
            top = randint(key, counter, height - h + 1)
            left = randint(key, counter + 1, width - w + 1)
            return top, left, h, w
    w, h = width, height
    if width < _ASPECT_MIN * height:
        h = int(np.rint(width / _ASPECT_MIN))
    elif width > _ASPECT_MAX * height:
        w = int(np.rint(height * _ASPECT_MAX))
    return (height - h) // 2, (width - w) // 2, h, w


@compiled
def _around_one(key: int, counter: int, spread: float) -> float:
    low = max(0.0, 1.0 - spread)
    return low + (1.0 + spread - low) * uniform(key, counter)


@compiled
def draw_sample(
    specs: np.ndarray,
    seed: int,
    epoch: int,
    index: int,
    height: int,
    width: int,
    out: np.ndarray,
) -> None:
    """Fill `out` (DRAW [V]) with all views' draws for sample `index`, of height x width pixels."""
    for v in range(len(specs)):
        spec = specs[v]
        draw = out[v]
        key = sample_key(seed, epoch, index, AUGMENT + v)
        top, left, h, w = draw_box(key, _BOX_DRAWS, height, width, spec.scale_min, spec.scale_max)
        draw.top, draw.left, draw.height, draw.width = top, left, h, w
        draw.flip = uniform(key, 0) < spec.flip_p
        draw.jitter = uniform(key, 1) < spec.jitter_p
        draw.order = randint(key, 2, 24)
        draw.brightness = _around_one(key, 3, spec.brightness)
        draw.contrast = _around_one(key, 4, spec.contrast)
        draw.saturation = _around_one(key, 5, spec.saturation)
        draw.hue = spec.hue * (2.0 * uniform(key, 6) - 1.0)
        draw.gray = uniform(key, 7) < spec.gray_p
        least, most = spec.blur_radius_min, spec.blur_radius_max
        radius = least + (most - least) * uniform(key, 8)
        draw.blur_radius = radius if uniform(key, 9) < spec.blur_p else 0.0
        draw.solarize = uniform(key, 10) < spec.solarize_p


@compiled
def draw_batch(
    specs: np.ndarray,
    seed: int,
    epoch: int,
    indices: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
) -> np.ndarray:
    """Draws of many samples, DRAW [B, V]; `specs` SPEC [V], the others int64 [B]."""
    out = np.zeros((len(indices), len(specs)), DRAW)
    for b in range(len(indices)):
        draw_sample(specs, seed, epoch, indices[b], heights[b], widths[b], out[b])
    return out


def draw_views(
    views: list[ViewSpec], seed: int, epoch: int, index: int, height: int, width: int
) -> np.ndarray:
    """Draws of one sample, DRAW records [V]; `height` and `width` of the stored photo in pixels."""
    out = np.zeros(len(views), dtype=DRAW)
    draw_sample(spec_table(views), seed, epoch, index, height, width, out)
    return out
