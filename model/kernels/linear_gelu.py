"""A linear layer and the GELU after it as one kernel, and the backward of both as another.

`hidden` is the layer's output without its bias, which is all that the backward needs. The kernels
need matrix units that Triton can use (sm_80 and later, half precision); elsewhere the product is
the library's, and `bias_gelu` follows it.

In shapes: T tokens, K input channels, D hidden channels, P programs of a backward.
"""

from typing import Any

import torch
from torch import Tensor

from ibeton.model.kernels.bias_gelu import (
    bias_gelu_backward,
    bias_gelu_forward,
    bias_gelu_reference,
    gelu_share,
    gelu_slope,
)
from ibeton.model.kernels.launch import (
    capability,
    interpreted,
    jit,
    launch,
    matrix_units,
    tl,
    triton,
)

ROWS, COLUMNS, INNER = 128, 128, 64  # of a tile of the product
HOPPER = 90


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K], weight [D, K], bias [D] -> hidden [T, D] and gelu(hidden + bias)."""
    hidden = x @ weight.t()
    return hidden, bias_gelu_reference(hidden, bias)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, keep: bool
) -> tuple[Tensor | None, Tensor]:
    """`linear_gelu_reference`; bias float32. Without `keep` the first is None."""
    if not matrix_units(x):
        hidden = x @ weight.t()
        return hidden if keep else None, bias_gelu_forward(hidden, bias)
    active = x.new_empty(len(x), len(weight))
    kept = torch.empty_like(active) if keep else None
    grid = (triton.cdiv(active.shape[1], COLUMNS), triton.cdiv(len(x), ROWS))
    launch(
        _linear_gelu_kernel, grid, x, weight, bias, kept, active, len(x), **_constants(x, active)
    )
    return kept, active


def linear_gelu_backward(
    grad: Tensor,  # [T, K], of the output of the next layer
    weight: Tensor,  # [K, D], of the next layer
    hidden: Tensor,  # [T, D]
    bias: Tensor,  # float32 [D]
    partial: Tensor,  # float32 [P, D], a view; receives the sums that make the gradient of the bias
    with_active: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of `hidden`, and the GELU's output again if `with_active`."""
    if not matrix_units(grad):
        return bias_gelu_backward(grad @ weight, hidden, bias, partial, with_active)
    grad_hidden = torch.empty_like(hidden)
    active = torch.empty_like(hidden) if with_active else None
    constants = _constants(grad, hidden)
    if capability(grad) >= HOPPER and not with_active:
        constants |= {"num_warps": 16}
    else:  # fewer registers
        constants |= {"COLUMNS": COLUMNS // 2}
    launch(
        _linear_gelu_backward_kernel,
        (triton.cdiv(hidden.shape[1], constants["COLUMNS"]), len(partial)),
        *(grad, weight, hidden, bias, grad_hidden, active, partial, partial.stride(0), len(grad)),
        **constants,
    )
    return grad_hidden, active


def _constants(x: Tensor, hidden: Tensor) -> dict[str, Any]:
    return {
        **{"INNER_WIDTH": x.shape[1], "WIDTH": hidden.shape[1]},
        **{"ROWS": ROWS, "COLUMNS": COLUMNS, "INNER": INNER},
        "WIDE": interpreted(),  # it multiplies by NumPy, which has no bfloat16
        **{"num_warps": 8, "num_stages": 3},
    }


@jit
def _tile_product(  # type: ignore[no-untyped-def]
    a,  # [T, K]
    b,  # [D, K] if B_BY_ROW, else [K, D]
    row,
    column,
    rows,  # T
    B_BY_ROW: tl.constexpr,
    INNER_WIDTH: tl.constexpr,  # K
    WIDTH: tl.constexpr,  # D
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rows and columns of a @ b or a @ b.T, float32 [ROWS, COLUMNS]."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    inner = tl.arange(0, INNER)
    for start in range(0, INNER_WIDTH, INNER):
        k = start + inner
        near = (row < rows)[:, None]
        across = (column < WIDTH)[None, :]
        if INNER_WIDTH % INNER:
            near &= (k < INNER_WIDTH)[None, :]
            across &= (k < INNER_WIDTH)[:, None]
        one = tl.load(
            a + row.to(tl.int64)[:, None] * INNER_WIDTH + k[None, :], mask=near, other=0.0
        )
        if B_BY_ROW:
            source = b + column[None, :] * INNER_WIDTH + k[:, None]
        else:
            source = b + k[:, None] * WIDTH + column[None, :]
        other = tl.load(source, mask=across, other=0.0)
        if WIDE:
            one, other = one.to(tl.float32), other.to(tl.float32)
        total = tl.dot(one, other, total, input_precision="ieee")
    return total


@jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The left and the right half of a tile. Taken one after the other they need half of the
    registers."""
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@jit
def _linear_gelu_kernel(  # type: ignore[no-untyped-def]
    x,  # [T, K]
    weight,  # [D, K]
    bias,  # float32 [D]
    hidden,  # [T, D] or None, out
    active,  # [T, D], out
    rows,  # T
    INNER_WIDTH: tl.constexpr,  # K
    WIDTH: tl.constexpr,  # D
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile. Consecutive programs take the same rows, so that these are read once, and the
    weights stay in the cache."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) * COLUMNS
    product = _tile_product(
        *(x, weight, row, first + tl.arange(0, COLUMNS), rows),
        *(True, INNER_WIDTH, WIDTH, ROWS, COLUMNS, INNER, WIDE),
    )
    halves = _halves(product, ROWS, COLUMNS)
    for i in tl.static_range(2):
        column = first + i * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
        at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        value = halves[i].to(active.dtype.element_ty)
        if hidden is not None:
            tl.store(hidden + at, value, mask=mask)
        shift = tl.load(bias + column, mask=column < WIDTH, other=0.0)
        value = value.to(tl.float32) + shift[None, :]
        value *= gelu_share(value)
        tl.store(active + at, value.to(active.dtype.element_ty), mask=mask)


@jit
def _linear_gelu_backward_kernel(  # type: ignore[no-untyped-def]
    grad,  # [T, K]
    weight,  # [K, D]
    hidden,  # [T, D]
    bias,  # float32 [D]
    grad_hidden,  # [T, D], out
    active,  # [T, D] or None, out
    partial,  # float32 [P, stride], out
    partial_stride,
    rows,  # T
    INNER_WIDTH: tl.constexpr,  # K
    WIDTH: tl.constexpr,  # D
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Every P-th tile of a strip of columns, and the sums over their rows."""
    first = tl.program_id(0) * COLUMNS
    left_sum = tl.zeros([COLUMNS // 2], tl.float32)
    right_sum = tl.zeros([COLUMNS // 2], tl.float32)
    for start in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = start + tl.arange(0, ROWS)
        product = _tile_product(
            *(grad, weight, row, first + tl.arange(0, COLUMNS), rows),
            *(False, INNER_WIDTH, WIDTH, ROWS, COLUMNS, INNER, WIDE),
        )
        halves = _halves(product, ROWS, COLUMNS)
        for i in tl.static_range(2):
            column = first + i * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
            inside = column < WIDTH
            mask = (row < rows)[:, None] & inside[None, :]
            at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
            value = tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32)
            value += tl.load(bias + column, mask=inside, other=0.0)[None, :]
            share = gelu_share(value)
            if active is not None:
                tl.store(active + at, (value * share).to(active.dtype.element_ty), mask=mask)
            share = gelu_slope(value, share)
            # Rounded as the library's product is.
            result = halves[i].to(grad_hidden.dtype.element_ty).to(tl.float32) * share
            tl.store(grad_hidden + at, result.to(grad_hidden.dtype.element_ty), mask=mask)
            if i == 0:
                left_sum += tl.sum(result, axis=0)
            else:
                right_sum += tl.sum(result, axis=0)
    column = first + tl.arange(0, COLUMNS // 2)
    partial += tl.program_id(1).to(tl.int64) * partial_stride
    tl.store(partial + column, left_sum, mask=column < WIDTH)
    column += COLUMNS // 2
    tl.store(partial + column, right_sum, mask=column < WIDTH)
