"""Layer norm followed by a linear layer, without keeping the normed tokens for the backward.

The backward needs the tokens before the norm anyway. It computes the normed ones from them and the
mean and deviation of each row, for a tenth of the cost of the product. Saves C values per token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm_linear_reference(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """x [T, C] -> linear(norm(x)) [T, D]."""
    return F.linear(
        F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps),
        linear.weight,
        linear.bias,
    )


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """As `norm_linear_reference`, autocast included."""
    return _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], scale, shift, eps)
        ctx.save_for_backward(x, mean, rstd, scale, shift, weight)
        ctx.eps, ctx.has_bias = eps, bias is not None
        return F.linear(normed, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale, shift, weight = ctx.saved_tensors
        normed = torch.native_layer_norm(x, x.shape[-1:], scale, shift, ctx.eps)[0]
        grad_weight = (grad.t() @ normed.to(grad.dtype)).to(weight.dtype)
        del normed
        grad_bias = grad.sum(dim=0).to(weight.dtype) if ctx.has_bias else None
        grad_normed = (grad @ weight.to(grad.dtype)).to(x.dtype)
        grad_x, grad_scale, grad_shift = torch.ops.aten.native_layer_norm_backward(
            grad_normed, x, x.shape[-1:], mean, rstd, scale, shift, [True, True, True]
        )
        return grad_x, grad_scale, grad_shift, None, grad_weight, grad_bias
