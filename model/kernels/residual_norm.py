"""Add a branch to the residual stream and apply the layer norm after it, in one pass.

In shapes: T tokens, C channels, P programs of a backward. The backward adds the gradient through
the norm to that of the stream, and sums those of gamma, beta, bias and layer scale over the tokens
of each program; `column_sums` then adds up the programs.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ibeton.model.kernels.column_sums import column_sums, partial_sums
from ibeton.model.kernels.launch import jit, launch, row_tile, tl, triton


class Branch(NamedTuple):
    """What is added to the stream: factor * scale * (out + bias)."""

    out: Tensor | None = None  # [T, C] in any float dtype; None: nothing is added
    bias: Tensor | None = None  # float32 [C]
    scale: Tensor | None = None  # float32 [C], layer scale
    factor: Tensor | None = None  # float32 [T, 1], stochastic depth: 0 or 1 / (1 - rate)

    def value(self) -> Tensor:
        """The sum's second term [T, C], float32 at least, in plain PyTorch."""
        assert self.out is not None
        out = self.out.to(torch.promote_types(self.out.dtype, torch.float32))
        out = out if self.bias is None else out + self.bias
        out = out if self.scale is None else self.scale * out
        return out if self.factor is None else self.factor * out


class Normed(NamedTuple):
    """The stream after the addition, and its norm."""

    x: Tensor  # float32 [T, C]
    out: Tensor  # [T, C]
    mean: Tensor  # float32 [T]
    rstd: Tensor  # float32 [T]


def residual_norm_reference(
    x: Tensor, branch: Branch, gamma: Tensor, beta: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x [T, C] -> the stream x + branch, and its layer norm in `dtype`."""
    x = x if branch.out is None else x + branch.value()
    return x, F.layer_norm(x, gamma.shape, gamma, beta, eps).to(dtype)


def residual_norm_forward(
    x: Tensor, branch: Branch, gamma: Tensor, beta: Tensor, eps: float, dtype: torch.dtype
) -> Normed:
    """`residual_norm_reference` by the kernel, for x float32. Without a branch the stream is `x`
    itself."""
    tokens, width = x.shape
    summed = x if branch.out is None else torch.empty_like(x)
    out = torch.empty(tokens, width, dtype=dtype, device=x.device)
    mean, rstd = x.new_empty(tokens), x.new_empty(tokens)
    tile = row_tile(width)
    launch(
        _residual_norm_kernel,
        (triton.cdiv(tokens, tile["ROWS"]),),
        x,
        *branch,
        gamma,
        beta,
        None if branch.out is None else summed,
        out,
        mean,
        rstd,
        tokens,
        EPS=eps,
        **tile,
    )
    return Normed(summed, out, mean, rstd)


def residual_norm_backward(
    grad_out: Tensor,  # [T, C], of the normed tokens
    grad_x: Tensor | None,  # float32 [T, C], of the stream; None: zero
    x: Tensor,  # float32 [T, C], of `Normed`, as the two below
    mean: Tensor,
    rstd: Tensor,
    branch: Branch,  # its `out` only where it has a scale
    branch_dtype: torch.dtype | None,  # of its `out`; None without a branch
    gamma: Tensor,
    partial: Tensor,  # float32 [P, columns of `partial_columns`], a view; receives the sums
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the stream before the addition, float32, and of `branch.out` in its dtype. The
    columns of `partial` are those of gamma, beta, bias and scale, C each; bias and scale only if
    the branch has them."""
    grad = torch.empty_like(x)
    grad_branch = None if branch_dtype is None else torch.empty_like(x, dtype=branch_dtype)
    launch(
        _residual_norm_backward_kernel,
        (len(partial),),
        grad_out,
        grad_x,
        x,
        mean,
        rstd,
        gamma,
        *branch,
        grad,
        grad_branch,
        partial,
        partial.stride(0),
        len(grad),
        HAS_BRANCH=branch_dtype is not None,
        **row_tile(grad.shape[1]),
    )
    return grad, grad_branch


def partial_columns(branch: Branch) -> int:
    """How many C columns of partial sums the backward writes: gamma, beta, bias, scale."""
    return 2 + (branch.bias is not None) + (branch.scale is not None)


@jit
def _residual_norm_kernel(  # type: ignore[no-untyped-def]
    x,  # float32 [T, C]
    branch,  # [T, C] or None, as all that belongs to the branch
    bias,  # float32 [C] or None
    scale,  # float32 [C] or None
    factor,  # float32 [T] or None
    gamma,  # float32 [C]
    beta,  # float32 [C]
    summed,  # float32 [T, C], out
    out,  # [T, C], out
    mean,  # float32 [T], out
    rstd,  # float32 [T], out
    tokens,  # T
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,  # C
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, C at least
):
    """One tile of whole rows: the sum, its mean and variance, and the normed row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    mask = (row < tokens)[:, None] & inside[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    value = tl.load(x + at, mask=mask, other=0.0)
    if branch is not None:
        added = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            added += tl.load(bias + column, mask=inside, other=0.0)[None, :]
        if scale is not None:
            added *= tl.load(scale + column, mask=inside, other=0.0)[None, :]
        if factor is not None:
            added *= tl.load(factor + row, mask=row < tokens, other=0.0)[:, None]
        value += added
        tl.store(summed + at, value, mask=mask)
    middle = tl.sum(tl.where(mask, value, 0.0), axis=1) / WIDTH
    centered = tl.where(mask, value - middle[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / WIDTH + EPS)
    tl.store(mean + row, middle, mask=row < tokens)
    tl.store(rstd + row, inverse, mask=row < tokens)
    weight = tl.load(gamma + column, mask=inside, other=0.0)[None, :]
    shift = tl.load(beta + column, mask=inside, other=0.0)[None, :]
    normed = centered * inverse[:, None] * weight + shift
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=mask)


@jit
def _residual_norm_backward_kernel(  # type: ignore[no-untyped-def]
    grad_out,  # [T, C]
    grad_x,  # float32 [T, C] or None
    x,  # float32 [T, C], the stream after the addition
    mean,  # float32 [T]
    rstd,  # float32 [T]
    gamma,  # float32 [C]
    branch,  # [T, C], for the gradient of `scale`; None without
    bias,  # float32 [C] or None
    scale,  # float32 [C] or None
    factor,  # float32 [T] or None
    grad,  # float32 [T, C], out
    grad_branch,  # [T, C] or None, out
    partial,  # float32 [P, stride], out
    partial_stride,
    tokens,  # T
    HAS_BRANCH: tl.constexpr,
    WIDTH: tl.constexpr,  # C
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every P-th tile of rows, and the sums over them."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    weight = tl.load(gamma + column, mask=inside, other=0.0)[None, :]
    gamma_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    beta_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    scale_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(program * ROWS, tokens, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        valid = row < tokens
        mask = valid[:, None] & inside[None, :]
        at = row[:, None] * WIDTH + column[None, :]
        upstream = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32)
        middle = tl.load(mean + row, mask=valid, other=0.0)[:, None]
        inverse = tl.load(rstd + row, mask=valid, other=0.0)[:, None]
        normed = tl.load(x + at, mask=mask, other=0.0)
        normed = tl.where(mask, (normed - middle) * inverse, 0.0)
        gamma_sum += upstream * normed
        beta_sum += upstream
        upstream *= weight
        along = tl.sum(upstream * normed, axis=1)[:, None] / WIDTH
        total = (upstream - tl.sum(upstream, axis=1)[:, None] / WIDTH - normed * along) * inverse
        if grad_x is not None:
            total += tl.load(grad_x + at, mask=mask, other=0.0)
        tl.store(grad + at, total, mask=mask)
        if HAS_BRANCH:
            total = tl.where(mask, total, 0.0)
            if factor is not None:
                total *= tl.load(factor + row, mask=valid, other=0.0)[:, None]
            if scale is not None:
                added = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
                if bias is not None:
                    added += tl.load(bias + column, mask=inside, other=0.0)[None, :]
                scale_sum += total * added
                total *= tl.load(scale + column, mask=inside, other=0.0)[None, :]
            bias_sum += total
            tl.store(grad_branch + at, total.to(grad_branch.dtype.element_ty), mask=mask)
    partial += program.to(tl.int64) * partial_stride + column
    tl.store(partial, tl.sum(gamma_sum, axis=0), mask=inside)
    tl.store(partial + WIDTH, tl.sum(beta_sum, axis=0), mask=inside)
    offset = 2 * WIDTH
    if bias is not None:
        tl.store(partial + offset, tl.sum(bias_sum, axis=0), mask=inside)
        offset += WIDTH
    if scale is not None:
        tl.store(partial + offset, tl.sum(scale_sum, axis=0), mask=inside)


def residual_norm(
    x: Tensor, branch: Branch, gamma: Tensor, beta: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`residual_norm_reference` by the kernel, with its own backward. x float32."""
    return _ResidualNorm.apply(x, *branch, gamma, beta, eps, dtype)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        out: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        factor: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        normed = residual_norm_forward(x, Branch(out, bias, scale, factor), gamma, beta, eps, dtype)
        kept = out if scale is not None else None
        ctx.save_for_backward(normed.x, normed.mean, normed.rstd, kept, bias, scale, factor, gamma)
        ctx.branch_dtype = None if out is None else out.dtype
        ctx.set_materialize_grads(False)
        return normed.x if out is not None else x.view_as(x), normed.out

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, kept, bias, scale, factor, gamma = ctx.saved_tensors
        branch = Branch(kept, bias, scale, factor)
        width = x.shape[1]
        partial = partial_sums(x, partial_columns(branch) * width)
        grad, grad_branch = residual_norm_backward(
            *(grad_out.contiguous(), grad_x, x, mean, rstd),
            *(branch, ctx.branch_dtype, gamma, partial),
        )
        sums = list(column_sums(partial).split(width))
        grad_bias = sums[2] if bias is not None else None
        grad_scale = sums[-1] if scale is not None else None
        return grad, grad_branch, grad_bias, grad_scale, None, sums[0], sums[1], None, None
