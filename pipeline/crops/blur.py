"""Pillow's GaussianBlur: three box blurs along each axis, in integers."""

import math

import numpy as np

from ibeton.pipeline.compiled import compiled
from ibeton.pipeline.crops.resize import padded
from ibeton.pipeline.crops.transpose import transpose

_F32, _U32 = np.float32, np.uint32
Array = np.ndarray


@compiled
def box_radius(sigma: float) -> np.float32:
    """Radius of the box that, run three times, blurs like a Gaussian of `sigma` (Gwosdek et al.,
    "Theoretical foundations of Gaussian convolution by extended box filtering", 2011)."""
    one, two, three = _F32(1.0), _F32(2.0), _F32(3.0)
    variance = _F32(_F32(_F32(sigma) * _F32(sigma)) / three)
    length = _F32(math.sqrt(12.0 * variance + 1.0))
    whole = _F32(math.floor((length - 1.0) / 2.0))
    # As in Pillow's C code, float32 from here on. numba widens an integer and a float32 to float64,
    # so every constant is a float32, too.
    next_one = _F32(whole + one)
    rest = _F32(
        _F32(_F32(two * whole) + one) * _F32(_F32(whole * next_one) - _F32(three * variance))
    )
    rest = _F32(rest / _F32(_F32(6.0) * _F32(variance - _F32(next_one * next_one))))
    return _F32(whole + rest)


@compiled
def _box_blur(source: Array, radius: float, out: Array) -> None:
    """One box blur along axis 0 of uint8 [n, m]: a running sum with fractional ends, edges
    repeated, rounded. Sums fit 32 bits, as the weights of a box add up to at most 2**24."""
    n, m = source.shape
    whole = int(radius)
    weight = int(_F32(1 << 24) / _F32(_F32(radius) * _F32(2.0) + _F32(1.0)))
    inner, edge = _U32(weight), _U32(((1 << 24) - (whole * 2 + 1) * weight) // 2)
    total = np.zeros(m, np.uint32)
    for t in range(-whole, whole + 1):
        line = source[min(max(t, 0), n - 1)]
        for x in range(m):
            total[x] += line[x]
    for y in range(n):
        before = source[max(y - whole - 1, 0)]
        leaving = source[max(y - whole, 0)]
        entering = source[min(y + whole + 1, n - 1)]
        to = out[y]
        for x in range(m):
            ends = _U32(_U32(before[x]) + _U32(entering[x]))
            value = _U32(_U32(total[x] * inner) + _U32(ends * edge))
            to[x] = np.uint8(_U32(value + _U32(1 << 23)) >> _U32(24))
            total[x] = _U32(_U32(total[x] + _U32(entering[x])) - _U32(leaving[x]))


@compiled
def gaussian_blur(view: Array, sigma: float) -> None:
    """Blur `view` uint8 [3, H, W] in place; `sigma` in pixels."""
    radius = box_radius(sigma)
    if radius <= 0:
        return
    height, width = view.shape[1], view.shape[2]
    # The three channels side by side, as few long rows are faster than many short ones.
    down, across = padded(height), padded(width)
    upright = np.empty((2, width, 3 * down), np.uint8)
    lying = np.empty((2, height, 3 * across), np.uint8)
    for c in range(3):
        transpose(view[c], 0, 1, 0, height, width, upright[0, :, c * down :])
    for step in range(3):
        _box_blur(upright[step % 2], radius, upright[1 - step % 2])
    for c in range(3):
        transpose(upright[1], 0, 1, c * down, width, height, lying[0, :, c * across :])
    for step in range(3):
        _box_blur(lying[step % 2], radius, lying[1 - step % 2])
    for c in range(3):
        view[c] = lying[1, :, c * across : c * across + width]
