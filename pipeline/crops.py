"""Decoded pixels + draws -> finished views, on the CPU, compiled, without the GIL.

Every operation computes what Pillow computes, in the same integer or float32 arithmetic, so the
views are Pillow's bit for bit; `pil_views.py` says the same in Pillow's and torchvision's own
words, and tests/pipeline/test_crops.py compares the two. All images are uint8 [H, W, 3].
"""

import math
from typing import Any

import numpy as np

from pipeline.compiled import compiled
from pipeline.draws import BRIGHTNESS, CONTRAST, HUE, JITTER_ORDERS, SATURATION

_RESIZE_BITS = 22  # Pillow's fixed point for 8-bit resampling
_F32 = np.float32
Array = np.ndarray


@compiled
def _clip8(x: int) -> np.uint8:
    return np.uint8(min(max(x, 0), 255))


@compiled
def _bicubic(x: float) -> float:
    """Keys' cubic kernel with a = -0.5."""
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return 0.0


@compiled
def resize_taps(source: int, target: int) -> tuple[Array, Array, Array]:
    """Taps of a 1-D antialiased bicubic resize from `source` to `target` pixels.

    Returns first [target] (first source pixel), count [target] and weights int32 [target, taps] in
    22-bit fixed point.
    """
    scale = source / target
    stretch = max(scale, 1.0)  # antialiasing: the kernel grows with the reduction
    support = 2.0 * stretch
    taps = math.ceil(support) * 2 + 1
    first = np.empty(target, np.int32)
    count = np.empty(target, np.int32)
    weights = np.zeros((target, taps), np.int32)
    exact = np.empty(taps, np.float64)
    for i in range(target):
        center = (i + 0.5) * scale
        low = max(0, int(center - support + 0.5))
        high = min(source, int(center + support + 0.5))
        total = 0.0
        for t in range(high - low):
            exact[t] = _bicubic((t + low - center + 0.5) * (1.0 / stretch))
            total += exact[t]
        for t in range(high - low):
            w = exact[t] * (1.0 / total) if total != 0.0 else exact[t]
            w *= 1 << _RESIZE_BITS
            weights[i, t] = int(w - 0.5) if w < 0 else int(w + 0.5)
        first[i] = low
        count[i] = high - low
    return first, count, weights


@compiled
def _resize_columns(source: Array, top: int, left: int, width: int, flip: bool, out: Array) -> None:
    """Resize columns left .. left + width of the rows from `top` on to out's columns."""
    rows, cols = out.shape[0], out.shape[1]
    first, count, weights = resize_taps(width, cols)
    half = 1 << (_RESIZE_BITS - 1)
    for y in range(rows):
        line = source[top + y]
        for x in range(cols):
            r, g, b = half, half, half
            start = left + first[x]
            for t in range(count[x]):
                w = weights[x, t]
                r += w * line[start + t, 0]
                g += w * line[start + t, 1]
                b += w * line[start + t, 2]
            to = cols - 1 - x if flip else x
            out[y, to, 0] = _clip8(r >> _RESIZE_BITS)
            out[y, to, 1] = _clip8(g >> _RESIZE_BITS)
            out[y, to, 2] = _clip8(b >> _RESIZE_BITS)


@compiled
def _resize_rows(source: Array, top: int, left: int, height: int, out: Array) -> None:
    """Resize rows top .. top + height of the columns from `left` on to out's rows."""
    rows, length = out.shape[0], out.shape[1] * 3
    first, count, weights = resize_taps(height, rows)
    flat_in = source.reshape(source.shape[0], source.shape[1] * 3)
    flat_out = out.reshape(rows, length)
    total = np.empty(length, np.int32)
    for y in range(rows):
        total[:] = 1 << (_RESIZE_BITS - 1)
        for t in range(count[y]):
            w = weights[y, t]
            line = flat_in[top + first[y] + t, left * 3 : left * 3 + length]
            for x in range(length):
                total[x] += w * line[x]
        for x in range(length):
            flat_out[y, x] = _clip8(total[x] >> _RESIZE_BITS)


@compiled
def resized_crop(
    pixels: Array, top: int, left: int, height: int, width: int, flip: bool, out: Array
) -> None:
    """Crop a box and resize it to `out` [S, S, 3], rounding to uint8 after each direction; mirrored
    left to right when `flip`."""
    size = out.shape[0]
    # Pillow 13 (observed) starts with the rows where that leaves much less to do for the columns;
    # the order shows in the rounding alone.
    if height > size and height - size > 2 * (width - size):
        short = np.empty((size, width, 3), np.uint8)
        _resize_rows(pixels, top, left, height, short)
        _resize_columns(short, 0, 0, width, flip, out)
    else:
        narrow = np.empty((height, size, 3), np.uint8)
        _resize_columns(pixels, top, left, width, flip, narrow)
        _resize_rows(narrow, 0, 0, height, out)


@compiled
def _luma(r: int, g: int, b: int) -> int:
    """ITU-R 601 grey in 16-bit fixed point."""
    return (19595 * int(r) + 38470 * int(g) + 7471 * int(b) + 0x8000) >> 16


@compiled
def _blend_table(low: int, factor: float) -> Array:
    """table[x] = low + factor * (x - low), in float32, truncated and clipped to 0..255."""
    table = np.empty(256, np.uint8)
    for x in range(256):
        value = _F32(low) + _F32(factor) * _F32(x - low)
        table[x] = np.uint8(min(max(value, _F32(0.0)), _F32(255.0)))
    return table


@compiled
def _apply_table(image: Array, table: Array) -> None:
    flat = image.reshape(-1)
    for i in range(flat.size):
        flat[i] = table[flat[i]]


@compiled
def adjust_brightness(image: Array, factor: float) -> None:
    """Blend with black, in place."""
    _apply_table(image, _blend_table(0, factor))


@compiled
def adjust_contrast(image: Array, factor: float) -> None:
    """Blend with the image's mean grey (rounded), in place."""
    flat = image.reshape(-1, 3)
    total = 0
    for i in range(flat.shape[0]):
        total += _luma(flat[i, 0], flat[i, 1], flat[i, 2])
    mean = int(total / flat.shape[0] + 0.5)
    _apply_table(image, _blend_table(mean, factor))


@compiled
def adjust_saturation(image: Array, factor: float) -> None:
    """Blend each pixel with its own grey, in place."""
    flat = image.reshape(-1, 3)
    f = _F32(factor)
    for i in range(flat.shape[0]):
        grey = _luma(flat[i, 0], flat[i, 1], flat[i, 2])
        for c in range(3):
            value = _F32(grey) + f * _F32(int(flat[i, c]) - grey)
            flat[i, c] = np.uint8(min(max(value, _F32(0.0)), _F32(255.0)))


@compiled
def _to_hue_saturation(r: int, g: int, b: int) -> tuple[int, int]:
    """Hue and saturation on 0..255 as Pillow's HSV has them; value is max(r, g, b)."""
    high = max(r, max(g, b))
    low = min(r, min(g, b))
    if high == low:
        return 0, 0
    span = _F32(high - low)
    rc = _F32(high - r) / span
    gc = _F32(high - g) / span
    bc = _F32(high - b) / span
    if r == high:
        h = bc - gc
    elif g == high:
        h = _F32(2.0 + rc - bc)
    else:
        h = _F32(4.0 + gc - rc)
    turn = h / 6.0 + 1.0
    turn = _F32(turn - math.floor(turn))
    saturation = span / _F32(high)
    return int(turn * 255.0), int(saturation * 255.0)


@compiled
def _half_away(x: float) -> int:
    """C's round for x >= 0."""
    return int(x + 0.5)


@compiled
def adjust_hue(image: Array, factor: float) -> None:
    """Turn the hue by `factor` of a circle in Pillow's 8-bit HSV, in place."""
    turn = int(_F32(factor) * 255.0)  # towards zero, then wrapped to 8 bits, as torchvision does
    flat = image.reshape(-1, 3)
    for i in range(flat.shape[0]):
        r, g, b = int(flat[i, 0]), int(flat[i, 1]), int(flat[i, 2])
        v = max(r, max(g, b))
        h, s = _to_hue_saturation(r, g, b)
        if s == 0:
            flat[i, 0] = flat[i, 1] = flat[i, 2] = v
            continue
        h = (h + turn) & 255
        sector = math.floor(h * 6.0 / 255.0)
        f = _F32(h * 6.0 / 255.0 - sector)
        fs = _F32(s / 255.0)
        p = _half_away(v * (1.0 - fs))
        q = _half_away(v * (1.0 - fs * f))
        t = _half_away(v * (1.0 - fs * (1.0 - f)))
        sector %= 6
        if sector == 0:
            r, g, b = v, t, p
        elif sector == 1:
            r, g, b = q, v, p
        elif sector == 2:
            r, g, b = p, v, t
        elif sector == 3:
            r, g, b = p, q, v
        elif sector == 4:
            r, g, b = t, p, v
        else:
            r, g, b = v, p, q
        flat[i, 0], flat[i, 1], flat[i, 2] = _clip8(r), _clip8(g), _clip8(b)


@compiled
def to_gray(image: Array) -> None:
    """All three channels become the ITU-R 601 grey, in place."""
    flat = image.reshape(-1, 3)
    for i in range(flat.shape[0]):
        grey = _luma(flat[i, 0], flat[i, 1], flat[i, 2])
        flat[i, 0] = flat[i, 1] = flat[i, 2] = grey


@compiled
def solarize(image: Array) -> None:
    """Values of 128 and more are inverted, in place."""
    flat = image.reshape(-1)
    for i in range(flat.size):
        if flat[i] >= 128:
            flat[i] = 255 - flat[i]


@compiled
def box_radius(sigma: float) -> np.float32:
    """Radius of the box that, run three times, blurs like a Gaussian of `sigma` (Gwosdek et al.,
    "Theoretical foundations of Gaussian convolution by extended box filtering", 2011)."""
    passes = 3
    variance = _F32(sigma) * _F32(sigma) / _F32(passes)
    length = _F32(math.sqrt(12.0 * variance + 1.0))
    whole = _F32(math.floor((length - 1.0) / 2.0))
    rest = (2 * whole + 1) * (whole * (whole + 1) - _F32(3.0) * variance)
    rest /= 6 * (variance - (whole + 1) * (whole + 1))
    return _F32(whole + rest)


@compiled
def _box_blur_lines(source: Array, out: Array, radius: float) -> None:
    """One box blur along axis 0 of [n, m]: a running sum with fractional ends, edges repeated,
    rounded to uint8. Lines along axis 0 keep the inner loop contiguous."""
    n, m = source.shape
    whole = int(radius)
    weight = np.int64(_F32(1 << 24) / _F32(_F32(radius) * _F32(2.0) + _F32(1.0)))
    edge = ((1 << 24) - (whole * 2 + 1) * weight) // 2
    total = np.zeros(m, np.int64)
    for t in range(-whole, whole + 1):
        line = source[min(max(t, 0), n - 1)]
        for x in range(m):
            total[x] += line[x]
    for y in range(n):
        before = source[max(y - whole - 1, 0)]
        leaving = source[max(y - whole, 0)]
        entering = source[min(y + whole + 1, n - 1)]
        for x in range(m):
            value = total[x] * weight + (np.int64(before[x]) + entering[x]) * edge
            out[y, x] = np.uint8((value + (1 << 23)) >> 24)
            total[x] += np.int64(entering[x]) - leaving[x]


@compiled
def gaussian_blur(image: Array, sigma: float) -> None:
    """Pillow's GaussianBlur: three box blurs along each axis, in place. `sigma` in pixels."""
    radius = box_radius(sigma)
    if radius <= 0:
        return
    rows, cols = image.shape[0], image.shape[1]
    upright = image.transpose(1, 0, 2).copy().reshape(cols, rows * 3)
    other = np.empty_like(upright)
    _box_blur_lines(upright, other, radius)
    _box_blur_lines(other, upright, radius)
    _box_blur_lines(upright, other, radius)
    lying = other.reshape(cols, rows, 3).transpose(1, 0, 2).copy().reshape(rows, cols * 3)
    back = np.empty_like(lying)
    _box_blur_lines(lying, back, radius)
    _box_blur_lines(back, lying, radius)
    _box_blur_lines(lying, image.reshape(rows, cols * 3), radius)


@compiled
def cut_view(pixels: Array, draw: Any, out: Array) -> None:
    """One finished view: `draw` (a DRAW record) of `pixels` [H, W, 3] into `out` [S, S, 3]."""
    resized_crop(pixels, draw.top, draw.left, draw.height, draw.width, draw.flip, out)
    if draw.jitter:
        for step in range(4):
            op = JITTER_ORDERS[draw.order][step]
            if op == BRIGHTNESS:
                adjust_brightness(out, draw.brightness)
            elif op == CONTRAST:
                adjust_contrast(out, draw.contrast)
            elif op == SATURATION:
                adjust_saturation(out, draw.saturation)
            elif op == HUE:
                adjust_hue(out, draw.hue)
    if draw.gray:
        to_gray(out)
    if draw.blur_radius > 0:
        gaussian_blur(out, draw.blur_radius)
    if draw.solarize:
        solarize(out)


@compiled
def cut_views(pixels: Array, draws: Array, global_out: Array, local_out: Array) -> None:
    """All views of one photo: `draws` DRAW [G + L] into global_out uint8 [G, S, S, 3] and
    local_out uint8 [L, s, s, 3]."""
    globals_ = global_out.shape[0]
    for v in range(globals_):
        cut_view(pixels, draws[v], global_out[v])
    for v in range(local_out.shape[0]):
        cut_view(pixels, draws[globals_ + v], local_out[v])
