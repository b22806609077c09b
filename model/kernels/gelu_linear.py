"""Exact GELU followed by a linear layer, keeping only the GELU's input for the backward.

The gradient of the layer's weights needs the GELU's output, which is computed again. Saves 4 C
values per token in a block's MLP, its largest tensor.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gelu_linear_reference(x: Tensor, linear: nn.Linear) -> Tensor:
    """x [T, D] -> linear(gelu(x)) [T, C]."""
    return F.linear(F.gelu(x), linear.weight, linear.bias)


def gelu_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """As `gelu_linear_reference`, autocast included."""
    return _GeluLinear.apply(x, linear.weight, linear.bias)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_weight = (grad.t() @ F.gelu(x).to(grad.dtype)).to(weight.dtype)
        grad_bias = grad.sum(dim=0).to(weight.dtype) if ctx.has_bias else None
        grad_x = torch.ops.aten.gelu_backward((grad @ weight.to(grad.dtype)).to(x.dtype), x)
        return grad_x, grad_weight, grad_bias
