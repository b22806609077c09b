"""Layer norm or GELU followed by a linear layer, without keeping what enters the layer.

The gradient of the layer's weights needs it. The backward computes it again: the normed tokens from
those before the norm and the mean and deviation of each row, for a tenth of the cost of the product
(saves C values per token); the GELU's output from its input (saves 4 C, a block's largest tensor).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """x [T, C] -> linear(norm(x)) [T, D], autocast included."""
    return _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias)


def gelu_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """x [T, D] -> linear(gelu(x)) [T, C], exact GELU, autocast included."""
    return _GeluLinear.apply(x, linear.weight, linear.bias)


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
        grad_weight, grad_bias = _parameters(grad, normed, weight, ctx.has_bias)
        del normed
        grad_normed = (grad @ weight.to(grad.dtype)).to(x.dtype)
        grad_x, grad_scale, grad_shift = torch.ops.aten.native_layer_norm_backward(
            grad_normed, x, x.shape[-1:], mean, rstd, scale, shift, [True, True, True]
        )
        return grad_x, grad_scale, grad_shift, None, grad_weight, grad_bias


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_weight, grad_bias = _parameters(grad, F.gelu(x), weight, ctx.has_bias)
        grad_x = torch.ops.aten.gelu_backward((grad @ weight.to(grad.dtype)).to(x.dtype), x)
        return grad_x, grad_weight, grad_bias


def _parameters(
    grad: Tensor, entered: Tensor, weight: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a linear layer's weight and bias."""
    grad_bias = grad.sum(dim=0).to(weight.dtype) if has_bias else None
    return (grad.t() @ entered.to(grad.dtype)).to(weight.dtype), grad_bias
