"""Pillow's antialiased bicubic resize of a crop, in passes over long contiguous rows.

A pass resizes along axis 0, where every tap is one multiply-add over a row, which compiles to wide
vector code; the other direction is the same pass over the transposed image. Photos come as columns
[3W, H]: row 3x + c holds channel c of column x.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ibeton.pipeline.compiled import compiled
from ibeton.pipeline.crops.transpose import transpose

BITS = 22  # Pillow's fixed point for 8-bit resampling
_LANES = 32  # pixels that a pass does at a time
Array = np.ndarray
Taps = tuple[Array, Array, Array]


@compiled
def _bicubic(x: float) -> float:
    """Keys' cubic kernel with a = -0.5."""
    x = abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return near if x < 1.0 else far if x < 2.0 else 0.0  # a choice, not a branch


@compiled
def resize_taps(source: int, target: int) -> Taps:
    """Taps of a 1-D antialiased bicubic resize from `source` to `target` pixels.

    Returns first [target] (first source pixel), count [target] and weights int32 [target, taps] in
    22-bit fixed point, 0 from count on.
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
        share = 1.0 / total if total != 0.0 else 1.0
        for t in range(high - low):
            w = exact[t] * share * (1 << BITS)
            weights[i, t] = int(w - 0.5) if w < 0 else int(w + 0.5)
        first[i] = low
        count[i] = high - low
    return first, count, weights


@intrinsic
def _resize_block(typing: Any, source: Any, stride: Any, weights: Any, count: Any, out: Any) -> Any:
    """32 pixels of an output row: the weighted sum of `count` rows, rounded and clipped to uint8.

    All arguments are addresses and lengths in bytes: `source` of the first row, with rows `stride`
    apart, of int32 `weights`, and of the pixels to write. Sums stay in registers over all taps;
    numba's own loops would store and load them.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, stride, weights, count, out = arguments
        byte, word = ir.IntType(8), ir.IntType(32)
        pixels, sums = ir.VectorType(byte, _LANES), ir.VectorType(word, _LANES)

        def splat(value: int) -> Any:
            return ir.Constant(sums, [value] * _LANES)

        total = cgutils.alloca_once_value(builder, splat(1 << (BITS - 1)))
        with cgutils.for_range(builder, count) as tap:
            row = builder.add(source, builder.mul(stride, tap.index))
            values = builder.load(builder.inttoptr(row, pixels.as_pointer()), align=1)
            at = builder.gep(builder.inttoptr(weights, word.as_pointer()), [tap.index])
            one = builder.insert_element(splat(0), builder.load(at, align=4), word(0))
            weight = builder.shuffle_vector(one, splat(0), splat(0))
            product = builder.mul(builder.zext(values, sums), weight)
            builder.store(builder.add(builder.load(total), product), total)
        value = builder.ashr(builder.load(total), splat(BITS))
        for limit, keep in ((0, ">"), (255, "<")):
            inside = builder.icmp_signed(keep, value, splat(limit))
            value = builder.select(inside, value, splat(limit))
        to = builder.inttoptr(out, pixels.as_pointer())
        builder.store(builder.trunc(value, pixels), to, align=1)
        return context.get_dummy_value()

    address = types.intp
    return types.void(address, address, address, address, address), emit


@compiled
def resize_rows(
    source: Array, start: int, step: int, left: int, taps: Taps, flip: bool, out: Array
) -> None:
    """Resize along axis 0 of uint8 `source` [n, m], rows `start`, start + step, ..., columns from
    `left` on, into out [S, k], rounded to uint8. With `flip` the last row comes first."""
    first, count, weights = taps
    rows, length = out.shape
    stride, begin, to = source.strides[0] * step, source.ctypes.data + left, out.ctypes.data
    for y in range(rows):
        line = rows - 1 - y if flip else y
        top = start + step * first[y]
        if length < _LANES:
            for x in range(length):
                total = 1 << (BITS - 1)
                for t in range(count[y]):
                    total += weights[y, t] * source[top + step * t, left + x]
                out[line, x] = min(max(total >> BITS, 0), 255)
            continue
        row, target = begin + top * source.strides[0], to + line * out.strides[0]
        weight = weights.ctypes.data + y * weights.strides[0]
        for block in range(0, length, _LANES):
            x = min(block, length - _LANES)  # the last block overlaps the one before
            _resize_block(row + x, stride, weight, count[y], target + x)


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
    # Pillow 13 (observed) starts with the rows if that leaves much less work for the columns; the
    # order affects only the rounding.
    rows_first = height > size and height - size > 2 * (width - size)
    first, second = (down, across) if rows_first else (across, down)
    length = width if rows_first else height  # of what the first pass leaves alone
    box = np.empty((height if rows_first else 0, padded(width)), np.uint8)
    half = np.empty((size, padded(length)), np.uint8)
    turned = np.empty((length, padded(size)), np.uint8)
    last = np.empty((size, padded(size)), np.uint8)
    for c in range(3):
        source, start, step, begin = columns, 3 * left + c, 3, top
        if rows_first:
            transpose(columns, start, step, top, width, height, box)
            source, start, step, begin = box, 0, 1, 0
        resize_rows(source, start, step, begin, first, flip and not rows_first, half)
        transpose(half, 0, 1, 0, size, length, turned)
        resize_rows(turned, 0, 1, 0, second, flip and rows_first, last if rows_first else out[c])
        if rows_first:
            transpose(last, 0, 1, 0, size, size, out[c])
