"""The transformer block as one autograd function over the Triton kernels of `model.kernels`.

`Block.forward` is the reference. Here the MLP's output is not added at the block's end: it is
returned as a `Branch`, which the first kernel of the next block adds together with its norm.
Matrix products run in the dtype of autocast; residual stream, statistics, sums and weight
gradients are float32.

In shapes: T packed tokens, R of them enter the MLP, C channels.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibeton.model.backbones.blocks import Block, Kept, Shapes
from ibeton.model.kernels.bias_gelu import bias_gelu_backward, bias_gelu_forward
from ibeton.model.kernels.column_sums import column_sums, partial_sums
from ibeton.model.kernels.half_weights import in_dtype, product_dtype, weight_gradient
from ibeton.model.kernels.packed_attention import Attended, attend, attention_backward
from ibeton.model.kernels.residual_norm import (
    Branch,
    partial_columns,
    residual_norm_backward,
    residual_norm_forward,
)


class Call(NamedTuple):
    """What a call of a block needs besides tensors with gradient."""

    shapes: Shapes
    num_heads: int
    eps: float
    dtype: torch.dtype  # of the matrix products
    factor_before: Tensor | None  # [T, 1], stochastic depth of the incoming branch
    factor: Tensor | None  # [R, 1], of the attention
    rows: Tensor | None  # int64 [R], the tokens that enter the MLP; None: all
    recompute: bool  # norms and GELU, in the backward
    needs_grad: bool
    for_backward: list[Attended]  # what the forward leaves


class Weights(NamedTuple):
    """The parameters of a block whose gradients its function computes, in this order."""

    bias_before: Tensor | None  # of the incoming branch
    scale_before: Tensor | None
    norm1: Tensor
    norm1_bias: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    proj: Tensor
    proj_bias: Tensor
    gamma_1: Tensor | None
    norm2: Tensor
    norm2_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor


def fused_block(
    block: Block,
    x: Tensor,  # float32 [T, C]
    before: Branch,  # what is still to be added to x
    shapes: Shapes,
    kept_attention: Kept | None,
    kept_mlp: Kept | None,  # of the tokens in `rows`
    rows: Tensor | None,
    recompute: bool,
    for_backward: list[Attended],
) -> tuple[Tensor, Branch]:
    """The stream float32 [R, C] after the block's attention, and its MLP's output.

    `for_backward`, an empty list, receives what checkpointing cannot drop, as autograd does not
    save it. A caller that checkpoints empties it after the forward; the block that is computed
    again fills it again.
    """
    attention, mlp = block.attn, block.mlp
    weights = Weights(
        before.bias,
        before.scale,
        *(block.norm1.weight, block.norm1.bias, attention.qkv.weight, attention.qkv.bias),
        *(attention.proj.weight, attention.proj.bias, block.gamma_1),
        *(block.norm2.weight, block.norm2.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight),
    )
    call = Call(
        shapes,
        attention.num_heads,
        block.norm1.eps,
        product_dtype(x),
        before.factor,
        kept_attention.factor if kept_attention is not None else None,
        rows,
        recompute,
        torch.is_grad_enabled(),
        for_backward,
    )
    x, out = _Block.apply(call, x, before.out, *weights)
    factor = kept_mlp.factor if kept_mlp is not None else None
    return x, Branch(out, mlp.fc2.bias, block.gamma_2, factor)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, x: Tensor, out_before: Tensor | None, *parameters: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        w = Weights(*parameters)  # type: ignore[arg-type]
        branch = Branch(out_before, w.bias_before, w.scale_before, call.factor_before)
        with torch.autocast(x.device.type, enabled=False):
            first = residual_norm_forward(x, branch, w.norm1, w.norm1_bias, call.eps, call.dtype)
            qkv_weight, qkv_bias = in_dtype(w.qkv, call.dtype), w.qkv_bias
            if qkv_bias is None:
                qkv = first.out @ qkv_weight.t()
            else:
                qkv = torch.addmm(in_dtype(qkv_bias, call.dtype), first.out, qkv_weight.t())
            attended = attend(qkv, call.shapes, call.num_heads, call.needs_grad)
            proj, fc1, fc2 = (in_dtype(t, call.dtype) for t in (w.proj, w.fc1, w.fc2))
            projected = attended.out @ proj.t()
            stream = first.x
            if call.rows is not None:
                stream, projected = (t.index_select(0, call.rows) for t in (stream, projected))
            added = Branch(projected, w.proj_bias, w.gamma_1, call.factor)
            second = residual_norm_forward(
                stream, added, w.norm2, w.norm2_bias, call.eps, call.dtype
            )
            hidden = second.out @ fc1.t()
            active = bias_gelu_forward(hidden, w.fc1_bias, in_place=not call.needs_grad)
            out = active @ fc2.t()
        if call.needs_grad:
            recomputed = (None, None, None) if call.recompute else (first.out, second.out, active)
            ctx.save_for_backward(
                *(first.x, first.mean, first.rstd, second.x, second.mean, second.rstd, hidden),
                *recomputed,
                out_before if w.scale_before is not None else None,
                projected if w.gamma_1 is not None else None,
                *(qkv_weight, proj, fc1, fc2, *parameters),
            )
            call.for_backward.append(attended)
        ctx.call = call
        ctx.has_before = out_before is not None
        return second.x, out

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        saved = iter(ctx.saved_tensors)
        first_x, mean1, rstd1, second_x, mean2, rstd2, hidden = (next(saved) for _ in range(7))
        normed1, normed2, active = (next(saved) for _ in range(3))
        out_before, projected = next(saved), next(saved)
        qkv_weight, proj, fc1, fc2 = (next(saved) for _ in range(4))
        w = Weights(*saved)
        if not call.for_backward:
            raise RuntimeError("the backward of a block runs once: its attention is freed")
        attended = call.for_backward.pop()
        if call.recompute:
            normed1 = _norm_again(first_x, w.norm1, w.norm1_bias, call)
            normed2 = _norm_again(second_x, w.norm2, w.norm2_bias, call)
        before = Branch(out_before, w.bias_before, w.scale_before, call.factor_before)
        added = Branch(projected, w.proj_bias, w.gamma_1, call.factor)
        width = first_x.shape[1]
        columns = [
            partial_columns(before) * width,
            3 * width,
            partial_columns(added) * width,
            hidden.shape[1],
        ]
        sums = partial_sums(first_x, sum(columns))
        norm1_sums, qkv_sums, norm2_sums, fc1_sums = sums.split(columns, dim=1)

        grad_out = grad_out.contiguous()
        grad_hidden, again = bias_gelu_backward(
            grad_out @ fc2, hidden, w.fc1_bias, fc1_sums, with_out=call.recompute, in_place=True
        )
        grad_fc2 = weight_gradient(grad_out, active if again is None else again, w.fc2)
        del active, again
        grad_fc1 = weight_gradient(grad_hidden, normed2, w.fc1)
        grad_x, grad_projected = residual_norm_backward(
            *(grad_hidden @ fc1, grad_x.contiguous(), second_x, mean2, rstd2),
            *(added, call.dtype, w.norm2, norm2_sums),
        )
        assert grad_projected is not None
        del grad_hidden, normed2
        if call.rows is not None:  # a token may occur twice, as padding does
            grad_x, grad_projected = (
                grad.new_zeros(first_x.shape).index_add_(0, call.rows, grad)
                for grad in (grad_x, grad_projected)
            )
        grad_proj = weight_gradient(grad_projected, attended.out, w.proj)
        grad_qkv = attention_backward(grad_projected @ proj, attended, qkv_sums)
        del attended, grad_projected
        grad_qkv_weight = weight_gradient(grad_qkv, normed1, w.qkv)
        grad_x, grad_before = residual_norm_backward(
            *(grad_qkv @ qkv_weight, grad_x, first_x, mean1, rstd1),
            *(before, call.dtype if ctx.has_before else None, w.norm1, norm1_sums),
        )
        norm1, qkv_bias, norm2, fc1_bias = column_sums(sums).split(columns)
        norm1, norm2 = norm1.split(width), norm2.split(width)
        gradients = Weights(
            norm1[2] if w.bias_before is not None else None,
            norm1[-1] if w.scale_before is not None else None,
            *(norm1[0], norm1[1], grad_qkv_weight),
            qkv_bias if w.qkv_bias is not None else None,
            *(grad_proj, norm2[2], norm2[3] if w.gamma_1 is not None else None),
            *(norm2[0], norm2[1], grad_fc1, fc1_bias, grad_fc2),
        )
        return None, grad_x, grad_before, *gradients


def _norm_again(x: Tensor, gamma: Tensor, beta: Tensor, call: Call) -> Tensor:
    return residual_norm_forward(x, Branch(), gamma, beta, call.eps, call.dtype).out
