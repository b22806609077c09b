"""Pillow's antialiased bicubic resize of a crop, in passes over long contiguous rows.

A pass resizes along axis 0, where every tap is one multiply-add over a row, which compiles to wide
vector code; the other direction is the same pass over the transposed image. Photos come as columns
[3W, H]: row 3x + c holds channel c of column x.
"""

import math
from typing import Any

import numpy as np

from pipeline.compiled import compiled, inlined

BITS = 22  # Pillow's fixed point for 8-bit resampling
_I32 = np.int32
_U64 = np.uint64
_HALF = _I32(1 << (BITS - 1))
_LANES = 32  # a pass over rows of a multiple of this has no remainder to do one by one
Array = np.ndarray
Taps = tuple[Array, Array, Array]


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
def resize_taps(source: int, target: int) -> Taps:
    """Taps of a 1-D antialiased bicubic resize from `source` to `target` pixels.

    Returns first [target] (first source pixel), count [target] and weights int32 [target, taps] in
    22-bit fixed point, 0 from count on; taps is a multiple of 4.
    """
    scale = source / target
    stretch = max(scale, 1.0)  # antialiasing: the kernel grows with the reduction
    support = 2.0 * stretch
    taps = (math.ceil(support) * 2 + 1 + 3) // 4 * 4
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
        share = 1.0 / total if total != 0.0 else 1.0
        for t in range(high - low):
            w = exact[t] * share * (1 << BITS)
            weights[i, t] = int(w - 0.5) if w < 0 else int(w + 0.5)
        first[i] = low
        count[i] = high - low
    return first, count, weights


@inlined
def _clip8(x: int) -> np.uint8:
    """Fixed point to 0..255."""
    return np.uint8(min(max(_I32(_I32(x) >> _I32(BITS)), _I32(0)), _I32(255)))


@inlined
def _taps4(w: tuple, a: int, b: int, c: int, d: int) -> Any:
    """Four weighted pixels; numba would widen each product to 64 bits, which halves a vector."""
    high = _I32(_I32(w[0] * _I32(a)) + _I32(w[1] * _I32(b)))
    return _I32(high + _I32(_I32(w[2] * _I32(c)) + _I32(w[3] * _I32(d))))


@compiled
def resize_rows(
    source: Array, start: int, step: int, left: int, taps: Taps, flip: bool, out: Array
) -> None:
    """Resize along axis 0 of uint8 `source` [n, m], rows `start`, start + step, ..., columns from
    `left` on, into out [S, k], rounded to uint8. With `flip` the last row comes first."""
    first, count, weights = taps
    rows, length = out.shape
    total = np.empty(length, np.int32)
    right = left + length
    for y in range(rows):
        to = out[rows - 1 - y if flip else y]
        at, last = start + step * first[y], count[y] - 1
        for t in range(0, count[y], 4):
            a = source[at + step * t, left:right]
            b = source[at + step * min(t + 1, last), left:right]
            c = source[at + step * min(t + 2, last), left:right]
            d = source[at + step * min(t + 3, last), left:right]
            w = (weights[y, t], weights[y, t + 1], weights[y, t + 2], weights[y, t + 3])
            if last < 4:  # all there is
                for x in range(length):
                    to[x] = _clip8(_I32(_HALF + _taps4(w, a[x], b[x], c[x], d[x])))
            elif t == 0:
                for x in range(length):
                    total[x] = _I32(_HALF + _taps4(w, a[x], b[x], c[x], d[x]))
            elif t + 4 <= last:
                for x in range(length):
                    total[x] = _I32(total[x] + _taps4(w, a[x], b[x], c[x], d[x]))
            else:
                for x in range(length):
                    to[x] = _clip8(_I32(total[x] + _taps4(w, a[x], b[x], c[x], d[x])))


@inlined
def _swap(a: int, b: int, bits: int, mask: int) -> tuple[int, int]:
    """Exchange what `a` has outside the mask with what `b` has under it; uint64."""
    return (a & mask) | ((b & mask) << bits), ((a >> bits) & mask) | (b & ~mask)


_BITS1, _MASK1 = _U64(8), _U64(0x00FF00FF00FF00FF)
_BITS2, _MASK2 = _U64(16), _U64(0x0000FFFF0000FFFF)
_BITS4, _MASK4 = _U64(32), _U64(0x00000000FFFFFFFF)


@inlined
def _transposed(
    a: int, b: int, c: int, d: int, e: int, f: int, g: int, h: int
) -> tuple[int, int, int, int, int, int, int, int]:
    """A block of 8 x 8 bytes, a row each, in three rounds: bytes, pairs and fours change places."""
    a, b = _swap(a, b, _BITS1, _MASK1)
    c, d = _swap(c, d, _BITS1, _MASK1)
    e, f = _swap(e, f, _BITS1, _MASK1)
    g, h = _swap(g, h, _BITS1, _MASK1)
    a, c = _swap(a, c, _BITS2, _MASK2)
    b, d = _swap(b, d, _BITS2, _MASK2)
    e, g = _swap(e, g, _BITS2, _MASK2)
    f, h = _swap(f, h, _BITS2, _MASK2)
    a, e = _swap(a, e, _BITS4, _MASK4)
    b, f = _swap(b, f, _BITS4, _MASK4)
    c, g = _swap(c, g, _BITS4, _MASK4)
    d, h = _swap(d, h, _BITS4, _MASK4)
    return a, b, c, d, e, f, g, h


@compiled
def transpose(
    source: Array, start: int, step: int, left: int, rows: int, cols: int, target: Array
) -> None:
    """target[x, y] = source[start + step * y, left + x] for `rows` x `cols` bytes. The rows of
    `target` must hold a multiple of 8 bytes; what lies beyond `rows` there becomes rubbish."""
    words, right = target.view(np.uint64), left + cols // 8 * 8
    last = start + step * (rows - 1)
    for y in range(0, rows, 8):
        at = start + step * y
        a = source[at, left:right].view(np.uint64)
        b = source[min(at + step, last), left:right].view(np.uint64)
        c = source[min(at + 2 * step, last), left:right].view(np.uint64)
        d = source[min(at + 3 * step, last), left:right].view(np.uint64)
        e = source[min(at + 4 * step, last), left:right].view(np.uint64)
        f = source[min(at + 5 * step, last), left:right].view(np.uint64)
        g = source[min(at + 6 * step, last), left:right].view(np.uint64)
        h = source[min(at + 7 * step, last), left:right].view(np.uint64)
        for k in range(a.size):
            block = _transposed(a[k], b[k], c[k], d[k], e[k], f[k], g[k], h[k])
            for i in range(8):
                words[8 * k + i, y // 8] = block[i]
    for x in range(cols // 8 * 8, cols):
        for y in range(rows):
            target[x, y] = source[start + step * y, left + x]


@compiled
def padded(n: int) -> int:
    """A row length of at least `n` that leaves the vector code no remainder."""
    return (n + _LANES - 1) // _LANES * _LANES


@compiled
def photo_columns(pixels: Array) -> Array:
    """uint8 [H, W, 3] -> [3W, H + room], the form that crops are resized from."""
    height, width = pixels.shape[0], pixels.shape[1]
    columns = np.empty((3 * width, padded(height) + _LANES), np.uint8)
    transpose(pixels.reshape(height, 3 * width), 0, 1, 0, height, 3 * width, columns)
    return columns


@compiled
def resized_crop(
    columns: Array, top: int, left: int, height: int, width: int, flip: bool, out: Array
) -> None:
    """Crop a box of a photo (see `photo_columns`) and resize it to `out` [3, S, S], rounding to
    uint8 after each direction; mirrored left to right when `flip`."""
    size = out.shape[1]
    across, down = resize_taps(width, size), resize_taps(height, size)
    # Pillow 13 (observed) starts with the rows where that leaves much less to do for the columns;
    # the order shows in the rounding alone.
    rows_first = height > size and height - size > 2 * (width - size)
    first, second = (down, across) if rows_first else (across, down)
    length = width if rows_first else height  # of what the first pass leaves alone
    box = np.empty((height if rows_first else 0, padded(width)), np.uint8)
    half = np.empty((size, padded(length)), np.uint8)
    turned = np.empty((length, padded(size)), np.uint8)
    last = np.empty((size, padded(size)), np.uint8)
    view = np.empty((size, padded(size)), np.uint8)
    for c in range(3):
        source, start, step, begin = columns, 3 * left + c, 3, top
        if rows_first:
            transpose(columns, start, step, top, width, height, box)
            source, start, step, begin = box, 0, 1, 0
        resize_rows(source, start, step, begin, first, flip and not rows_first, half)
        transpose(half, 0, 1, 0, size, length, turned)
        resize_rows(turned, 0, 1, 0, second, flip and rows_first, last if rows_first else out[c])
        if rows_first:
            transpose(last, 0, 1, 0, size, size, view)
            out[c] = view[:, :size]
