"""Transposition of bytes, in blocks that stay in registers.

Resizing and blurring run over long rows; the other direction is the same on the transposed image.
Half of the croppers' memory traffic is here.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ibeton.pipeline.compiled import compiled

_SIDE = 16  # bytes in a vector register of any x86 or ARM processor
_ROUNDS = 4  # 2**4 = 16
Array = np.ndarray


@intrinsic
def _transpose_block(typing: Any, source: Any, stride: Any, target: Any, pitch: Any) -> Any:
    """Transpose 16 x 16 bytes: rows `stride` bytes apart from address `source` on, into rows
    `pitch` bytes apart from address `target` on.

    Each round interleaves the first half of the rows with the second, byte by byte; four rounds
    transpose. It is written in LLVM's instructions, as numba would move single bytes.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, stride, target, pitch = arguments
        row_type = ir.VectorType(ir.IntType(8), _SIDE)

        def address(base: Any, step: Any, row: int) -> Any:
            at = builder.add(base, builder.mul(step, step.type(row)))
            return builder.inttoptr(at, row_type.as_pointer())

        rows = [builder.load(address(source, stride, i), align=1) for i in range(_SIDE)]
        places = ir.VectorType(ir.IntType(32), _SIDE)
        pairs = [place for i in range(_SIDE) for place in (i, _SIDE + i)]
        halves = ir.Constant(places, pairs[:_SIDE]), ir.Constant(places, pairs[_SIDE:])
        for _ in range(_ROUNDS):
            rows = [
                builder.shuffle_vector(rows[i], rows[i + _SIDE // 2], half)
                for i in range(_SIDE // 2)
                for half in halves
            ]
        for i, row in enumerate(rows):
            builder.store(row, address(target, pitch, i), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), emit


@compiled
def transpose(
    source: Array, start: int, step: int, left: int, rows: int, cols: int, target: Array
) -> None:
    """target[x, y] = source[start + step * y, left + x] for `rows` x `cols` bytes; nothing else of
    `target` is written. Both are uint8, with rows of contiguous bytes."""
    if rows < _SIDE or cols < _SIDE:
        for x in range(cols):
            for y in range(rows):
                target[x, y] = source[start + step * y, left + x]
        return
    stride, pitch = source.strides[0] * step, target.strides[0]
    begin, to = source.ctypes.data + source.strides[0] * start + left, target.ctypes.data
    for block_y in range(0, rows, _SIDE):
        y = min(block_y, rows - _SIDE)  # the last block overlaps the one before
        for block_x in range(0, cols, _SIDE):
            x = min(block_x, cols - _SIDE)
            _transpose_block(begin + y * stride + x, stride, to + x * pitch + y, pitch)
