"""Bias and exact GELU in one pass, and a backward that also sums the bias gradient.

In shapes: T tokens, D channels of a hidden layer, P programs of a backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ibeton.model.kernels.column_sums import column_sums, partial_sums
from ibeton.model.kernels.launch import jit, launch, tl, triton

ROWS, COLUMNS = 8, 128  # of a tile


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """x [T, D], bias [D] -> gelu(x + bias) [T, D], computed in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.gelu(x.to(wide) + bias).to(x.dtype)


def bias_gelu_forward(x: Tensor, bias: Tensor, in_place: bool = False) -> Tensor:
    """`bias_gelu_reference` by the kernel; bias float32. `in_place`: in the memory of x."""
    tokens, width = x.shape
    out = x if in_place else torch.empty_like(x)
    grid = (triton.cdiv(tokens, ROWS), triton.cdiv(width, COLUMNS))
    launch(
        _bias_gelu_kernel, grid, x, bias, out, tokens, WIDTH=width, ROWS=ROWS, COLUMNS=COLUMNS,
        num_warps=4,
    )  # fmt: skip
    return out


def bias_gelu_backward(
    grad_out: Tensor,
    x: Tensor,
    bias: Tensor,
    partial: Tensor,  # float32 [P, D], a view; receives the sums that make the bias's gradient
    with_out: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of x, and the output again if `with_out`. `in_place`: the gradient in the memory of
    `grad_out`."""
    tokens, width = x.shape
    grad = grad_out if in_place else torch.empty_like(x)
    out = torch.empty_like(x) if with_out else None
    launch(
        _bias_gelu_backward_kernel,
        (len(partial), triton.cdiv(width, COLUMNS)),
        grad_out,
        x,
        bias,
        grad,
        out,
        partial,
        partial.stride(0),
        tokens,
        WIDTH=width,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    return grad, out


@jit
def normal(value):  # type: ignore[no-untyped-def]
    """Distribution function and density of the standard normal distribution, float32.

    gelu(x) is x * distribution, its derivative distribution + x * density. The approximation is
    26.2.17 of Abramowitz and Stegun, Handbook of Mathematical Functions, within 7.5e-8: one
    exponential for both, where `erf` would take a second one and twice the instructions.
    """
    density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * value * value)
    t = 1.0 / (1.0 + 0.2316419 * tl.abs(value))
    series = -1.821255978 + t * 1.330274429
    series = 1.781477937 + t * series
    series = -0.356563782 + t * series
    series = 0.319381530 + t * series
    tail = density * t * series
    return tl.where(value < 0.0, tail, 1.0 - tail), density


@jit
def _bias_gelu_kernel(  # type: ignore[no-untyped-def]
    x,  # [T, D]
    bias,  # float32 [D]
    out,  # [T, D], out
    tokens,  # T
    WIDTH: tl.constexpr,  # D
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < tokens)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=column < WIDTH, other=0.0)[None, :]
    share, _ = normal(value)
    value *= share
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@jit
def _bias_gelu_backward_kernel(  # type: ignore[no-untyped-def]
    grad_out,  # [T, D]
    x,  # [T, D]
    bias,  # float32 [D]
    grad,  # [T, D], out
    out,  # [T, D] or None, out
    partial,  # float32 [P, stride], out
    partial_stride,
    tokens,  # T
    WIDTH: tl.constexpr,  # D
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Every P-th tile of a strip of columns, and the sums over them."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    shift = tl.load(bias + column, mask=inside, other=0.0)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < tokens)[:, None] & inside[None, :]
        at = row[:, None] * WIDTH + column[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + shift
        upstream = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32)
        share, density = normal(value)
        if out is not None:
            tl.store(out + at, (value * share).to(out.dtype.element_ty), mask=mask)
        result = upstream * (share + value * density)
        total += result
        tl.store(grad + at, result.to(grad.dtype.element_ty), mask=mask)
    partial += tl.program_id(0).to(tl.int64) * partial_stride + column
    tl.store(partial, tl.sum(total, axis=0), mask=inside)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """`bias_gelu_reference` by the kernel, with its own backward."""
    return _BiasGelu.apply(x, bias)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        return bias_gelu_forward(x, bias)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = ctx.saved_tensors
        partial = partial_sums(x, x.shape[1])
        grad, _ = bias_gelu_backward(grad_out.contiguous(), x, bias, partial)
        return grad, column_sums(partial)
