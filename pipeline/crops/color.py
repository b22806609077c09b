"""Color operations on a view in place, as Pillow computes them; views are uint8 [3, n].

Integers are int32 and reals float32 wherever the result stays Pillow's: numba would widen both to
64 bits, which halves the elements of a vector register.
"""

from typing import Any

import numpy as np

from ibeton.pipeline.compiled import compiled, inlined

_I32, _U32, _F32 = np.int32, np.uint32, np.float32
_LOW, _HIGH = _F32(0.0), _F32(255.0)
Array = np.ndarray
Int32 = Any  # numba's, of which mypy knows nothing
Float32 = Any


@inlined
def _luma(r: int, g: int, b: int) -> Int32:
    """ITU-R 601 gray in 16-bit fixed point."""
    weighted = _I32(_I32(19595) * _I32(r)) + _I32(_I32(38470) * _I32(g))
    return _I32(_I32(weighted + _I32(_I32(7471) * _I32(b)) + _I32(0x8000)) >> _I32(16))


@inlined
def _blended(value: int, with_: Float32, factor: Float32) -> np.uint8:
    """with_ + factor * (value - with_) in float32, clipped to 0..255 and truncated."""
    mixed: Float32 = with_ + factor * (_F32(value) - with_)
    return np.uint8(_I32(min(max(mixed, _LOW), _HIGH)))


@compiled
def _blend(view: Array, with_: float, factor: float) -> None:
    for c in range(3):
        channel = view[c]
        for i in range(channel.size):
            channel[i] = _blended(channel[i], _F32(with_), _F32(factor))


@compiled
def adjust_brightness(view: Array, factor: float) -> None:
    """Blend with black."""
    _blend(view, 0.0, factor)


@compiled
def adjust_contrast(view: Array, factor: float) -> None:
    """Blend with the view's mean gray (rounded)."""
    r, g, b = view[0], view[1], view[2]
    total = 0
    for start in range(0, r.size, 4096):  # short enough for a sum in 32 bits
        part: Int32 = _I32(0)
        for i in range(start, min(start + 4096, r.size)):
            part = _I32(part + _luma(r[i], g[i], b[i]))
        total += part
    _blend(view, int(total / r.size + 0.5), factor)


@compiled
def adjust_saturation(view: Array, factor: float) -> None:
    """Blend each pixel with its own gray."""
    r, g, b = view[0], view[1], view[2]
    f = _F32(factor)
    for i in range(r.size):
        gray = _F32(_luma(r[i], g[i], b[i]))
        r[i] = _blended(r[i], gray, f)
        g[i] = _blended(g[i], gray, f)
        b[i] = _blended(b[i], gray, f)


@inlined
def _to_hsv(r: Int32, g: Int32, b: Int32) -> tuple[Int32, Int32, Int32]:
    """Pillow's 8-bit hue, saturation and value; all arguments and results int32.

    Of Pillow's three distances to the highest channel, in units of the span, one is always 0 and
    one always 1, so a single division remains.
    """
    high, low = _I32(max(r, max(g, b))), _I32(min(r, min(g, b)))
    span = _I32(high - low)
    middle = _I32(_I32(_I32(r + g) + b) - _I32(high + low))
    distance = _F32(_F32(_I32(high - middle)) / _F32(max(span, _I32(1))))
    red_high, green_high, green_low, blue_low = r == high, g == high, g == low, b == low
    # Choices, not branches: a loop with branches would not become vector code.
    by_red = distance - _F32(1) if green_low else _F32(1) - distance
    by_green = _F32(1) + distance if blue_low else _F32(3) - distance
    by_blue = _F32(5) - distance if green_low else _F32(3) + distance
    turn = _F32((by_red if red_high else by_green if green_high else by_blue) / _F32(6))
    turn = _F32(turn + _F32(1) if turn < _LOW else turn)
    saturation = _I32(_F32(_F32(span) / _F32(max(high, _I32(1)))) * _HIGH)
    return _I32(turn * _HIGH), saturation, high


@inlined
def _beyond(hue: Int32, corner: int) -> Int32:
    """How far `hue` (255 a sixth of the circle) is from `corner`, less a sixth; 0..255."""
    away = _I32(hue - _I32(corner))
    return _I32(min(max(_I32(max(away, _I32(-away)) - _I32(255)), _I32(0)), _I32(255)))


@inlined
def _channel(value: Int32, saturation: Int32, color: Int32) -> Int32:
    """round(value * (1 - saturation / 255 * color / 255)) in 24-bit fixed point."""
    lost = _I32(_F32(_I32(saturation * color)) * _F32((1 << 24) / 65025))
    kept = _I32(_I32(1 << 24) - lost)
    return _I32(_U32(_U32(_U32(value) * _U32(kept)) + _U32(1 << 23)) >> _U32(24))


@compiled
def adjust_hue(view: Array, factor: float) -> None:
    """Turn the hue by `factor` of a circle in Pillow's 8-bit HSV.

    Every intermediate is cast: to numba, the difference of two int32 is an int64, which AVX2
    converts to float one lane at a time.
    """
    turn = _I32(_F32(factor) * 255.0)  # towards zero, then wrapped to 8 bits, as torchvision does
    red, green, blue = view[0], view[1], view[2]
    for i in range(red.size):
        h, s, v = _to_hsv(_I32(red[i]), _I32(green[i]), _I32(blue[i]))
        hue = _I32(_I32(_I32(h + turn) & _I32(255)) * _I32(6))
        # Pillow distinguishes six cases. A channel's color is the same ramp in each, measured from
        # the opposite corner (red) or its own (green, blue).
        red[i] = _channel(v, s, _I32(_I32(255) - _beyond(hue, 765)))
        green[i] = _channel(v, s, _beyond(hue, 510))
        blue[i] = _channel(v, s, _beyond(hue, 1020))


@compiled
def to_gray(view: Array) -> None:
    """All three channels become the ITU-R 601 gray."""
    r, g, b = view[0], view[1], view[2]
    for i in range(r.size):
        gray = np.uint8(_luma(r[i], g[i], b[i]))
        r[i], g[i], b[i] = gray, gray, gray


@compiled
def solarize(view: Array) -> None:
    """Values of 128 and more are inverted."""
    for c in range(3):
        channel = view[c]
        for i in range(channel.size):
            value = channel[i]
            channel[i] = ~value if value >= 128 else value
