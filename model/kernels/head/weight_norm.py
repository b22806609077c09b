"""The prototypes g * v / |v| in one pass, in the precision of matrix products, and the backward.

In shapes: K prototypes, D channels.
"""

import torch
from torch import Tensor

from ibeton.model.kernels.launch import jit, launch, row_tile, tl, triton


def weight_norm_reference(direction: Tensor, length: Tensor) -> Tensor:
    """v [K, D], g [K, 1] -> g * v / |v| [K, D]."""
    return direction * (length / direction.norm(dim=1, keepdim=True))


def weight_norm(
    direction: Tensor, length: Tensor, dtype: torch.dtype, exact: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`weight_norm_reference` of float32 tensors, in `dtype` and, if `exact`, in float32 too."""
    out = torch.empty_like(direction, dtype=dtype)
    wide = torch.empty_like(direction) if exact else None
    _launch(_weight_norm_kernel, direction, length, out, wide)
    return out, wide


def weight_norm_backward(
    grads: list[Tensor],  # float32 [K, D], one or two, which are added
    direction: Tensor,
    length: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of v and g."""
    grad_direction, grad_length = torch.empty_like(direction), torch.empty_like(length)
    first, second = [*grads, None][:2]
    _launch(
        _weight_norm_backward_kernel,
        *(direction, length, first, second, grad_direction, grad_length),
    )
    return grad_direction, grad_length


def _launch(kernel: object, direction: Tensor, *rest: Tensor | None) -> None:
    rows, width = direction.shape
    tile = row_tile(width)
    launch(kernel, (triton.cdiv(rows, tile["ROWS"]),), direction, *rest, rows, **tile)


@jit
def _weight_norm_kernel(  # type: ignore[no-untyped-def]
    direction,  # float32 [K, D]
    length,  # float32 [K]
    out,  # [K, D], out
    wide,  # float32 [K, D] or None, out
    rows,  # K
    WIDTH: tl.constexpr,  # D
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, D at least
):
    """One tile of whole rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    value = tl.load(direction + at, mask=mask, other=0.0)
    norm = tl.where(row < rows, tl.sqrt(tl.sum(value * value, axis=1)), 1.0)
    value *= (tl.load(length + row, mask=row < rows, other=0.0) / norm)[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)
    if wide is not None:
        tl.store(wide + at, value, mask=mask)


@jit
def _weight_norm_backward_kernel(  # type: ignore[no-untyped-def]
    direction,  # float32 [K, D]
    length,  # float32 [K]
    grad,  # float32 [K, D]
    more_grad,  # float32 [K, D] or None
    grad_direction,  # float32 [K, D], out
    grad_length,  # float32 [K], out
    rows,  # K
    WIDTH: tl.constexpr,  # D
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of whole rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    unit = tl.load(direction + at, mask=mask, other=0.0)
    norm = tl.where(row < rows, tl.sqrt(tl.sum(unit * unit, axis=1)), 1.0)
    inverse = (1.0 / norm)[:, None]
    unit = tl.where(mask, unit * inverse, 0.0)
    value = tl.load(grad + at, mask=mask, other=0.0)
    if more_grad is not None:
        value += tl.load(more_grad + at, mask=mask, other=0.0)
    along = tl.sum(value * unit, axis=1)
    tl.store(grad_length + row, along, mask=row < rows)
    scale = tl.load(length + row, mask=row < rows, other=0.0)[:, None] * inverse
    tl.store(grad_direction + at, (value - unit * along[:, None]) * scale, mask=mask)
