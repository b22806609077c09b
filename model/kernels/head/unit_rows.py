"""Add a bias to rows and scale them to length one, and the backward.

The pass can also sum the unit vectors over the patches of images: their mean gives the mean logits
of all patches, as the last layer is linear.

In shapes: R rows, D channels, P programs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ibeton.model.kernels.launch import jit, launch, row_tile, tl, triton

EPS = 1e-12  # the shortest length that a row is divided by, as `F.normalize` has it
PROGRAMS = 512


def unit_rows_reference(x: Tensor, bias: Tensor) -> Tensor:
    """x [R, D], bias float32 [D] -> x + bias over its norm, float32 [R, D]."""
    return F.normalize(x.float() + bias, dim=-1, eps=EPS)


def unit_rows(
    x: Tensor, bias: Tensor, partial: Tensor | None = None, period: int = 1
) -> tuple[Tensor, Tensor]:
    """`unit_rows_reference` in the dtype of x, and the factor of each row, float32 [R]. `partial`
    float32 [P, D] receives sums over all rows but every `period`-th, which is a class token."""
    rows, width = x.shape
    out, factor = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    tile = row_tile(width)
    programs = min(PROGRAMS, triton.cdiv(rows, tile["ROWS"])) if partial is None else len(partial)
    launch(
        _unit_rows_kernel,
        (programs,),
        *(x, bias, out, factor, partial, rows, period),
        EPS=EPS,
        **tile,
    )
    return out, factor


def unit_rows_backward(
    grad: Tensor, x: Tensor, bias: Tensor, factor: Tensor, partial: Tensor
) -> Tensor:
    """Gradient of x [R, D], and in `partial` float32 [P, D], a view, the sums that make the
    bias's."""
    rows, width = x.shape
    grad_x = torch.empty_like(x)
    launch(
        _unit_rows_backward_kernel,
        (len(partial),),
        *(grad, x, bias, factor, grad_x, partial, partial.stride(0), rows),
        EPS=EPS,
        **row_tile(width),
    )
    return grad_x


@jit
def _unit_rows_kernel(  # type: ignore[no-untyped-def]
    x,  # [R, D]
    bias,  # float32 [D]
    out,  # [R, D], out
    factor,  # float32 [R], out
    partial,  # float32 [P, D] or None, out
    rows,  # R
    period,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,  # D
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, D at least
):
    """Every P-th tile of whole rows."""
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    shift = tl.load(bias + column, mask=inside, other=0.0)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * WIDTH + column[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value + shift, 0.0)
        length = tl.sqrt(tl.sum(value * value, axis=1))
        inverse = 1.0 / tl.maximum(length, EPS)
        value *= inverse[:, None]
        tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)
        tl.store(factor + row, inverse, mask=row < rows)
        if partial is not None:
            total += tl.where((row % period != 0)[:, None], value, 0.0)
    if partial is not None:
        out_at = tl.program_id(0).to(tl.int64) * WIDTH + column
        tl.store(partial + out_at, tl.sum(total, axis=0), mask=inside)


@jit
def _unit_rows_backward_kernel(  # type: ignore[no-untyped-def]
    grad,  # [R, D]
    x,  # [R, D]
    bias,  # float32 [D]
    factor,  # float32 [R]
    grad_x,  # [R, D], out
    partial,  # float32 [P, stride], out
    partial_stride,
    rows,  # R
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,  # D
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every P-th tile of whole rows, and the sums over them."""
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    shift = tl.load(bias + column, mask=inside, other=0.0)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * WIDTH + column[None, :]
        inverse = tl.load(factor + row, mask=row < rows, other=0.0)[:, None]
        unit = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        unit = tl.where(mask, (unit + shift) * inverse, 0.0)
        value = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        along = tl.sum(value * unit, axis=1)[:, None]
        # A row shorter than EPS is divided by a constant.
        along = tl.where(inverse * EPS < 1.0, along, 0.0)
        value = (value - unit * along) * inverse
        total += value
        tl.store(grad_x + at, value.to(grad_x.dtype.element_ty), mask=mask)
    partial += tl.program_id(0).to(tl.int64) * partial_stride + column
    tl.store(partial, tl.sum(total, axis=0), mask=inside)
