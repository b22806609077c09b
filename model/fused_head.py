"""The projection head as two autograd functions over the Triton kernels of `model.kernels`: tokens
to unit vectors, and unit vectors to logits.

`IBOTHead` defines the values. Products run in the dtype of autocast; lengths, biases, sums and
weight gradients are float32. In shapes: R tokens, C channels, D of the bottleneck, K prototypes.
"""

from typing import Any

import torch
from torch import Tensor

from ibeton.model.kernels.column_sums import column_sums, partial_sums
from ibeton.model.kernels.half_weights import in_dtype, product_dtype, weight_gradient
from ibeton.model.kernels.linear_gelu import linear_gelu, linear_gelu_backward
from ibeton.model.kernels.unit_rows import unit_rows, unit_rows_backward
from ibeton.model.kernels.weight_norm import weight_norm, weight_norm_backward


def fused_bottleneck(
    x: Tensor,  # [R, C]
    layers: list[tuple[Tensor, Tensor]],  # weight and bias of each linear layer, GELUs between
) -> Tensor:
    """Unit vectors [R, D] in the dtype of products."""
    parameters = [parameter for layer in layers for parameter in layer]
    return _Bottleneck.apply(x, product_dtype(x), torch.is_grad_enabled(), *parameters)


def bottleneck_and_mean(
    x: Tensor, layers: list[tuple[Tensor, Tensor]], tokens: int
) -> tuple[Tensor, Tensor]:
    """`fused_bottleneck` without gradient of images with `tokens` rows each, and the mean of the
    unit vectors of all patches, float32 [D]. The first row of each image is its class token."""
    *hidden, (weight, bias) = layers
    dtype = product_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        *_, product = _products(x.to(dtype), hidden, weight, keep=False)
        partial = partial_sums(product, product.shape[1])
        units, _ = unit_rows(product, bias, partial, tokens)
    return units, column_sums(partial) / (len(x) - len(x) // tokens)


def _products(
    x: Tensor, hidden: list[tuple[Tensor, Tensor]], weight: Tensor, keep: bool
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """What enters each layer and each GELU (if they are kept), and the last layer's output without
    its bias."""
    entering, before_gelu = [x], []
    for matrix, bias in hidden:
        inner, x = linear_gelu(x, in_dtype(matrix, x.dtype), bias, keep)
        if inner is not None:
            entering.append(x)
            before_gelu.append(inner)
    return entering, before_gelu, x @ in_dtype(weight, x.dtype).t()


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, needs_grad: bool, *parameters: Tensor
    ) -> Tensor:
        *hidden, (weight, bias) = _pairs(parameters)
        with torch.autocast(x.device.type, enabled=False):
            entering, before_gelu, product = _products(x.to(dtype), hidden, weight, needs_grad)
            units, factor = unit_rows(product, bias)
        if needs_grad:
            ctx.save_for_backward(product, factor, *entering, *before_gelu, *parameters)
        ctx.x_dtype, ctx.layers = x.dtype, len(hidden) + 1
        return units

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        product, factor, *saved = ctx.saved_tensors
        entering, saved = saved[: ctx.layers], saved[ctx.layers :]
        before_gelu, parameters = saved[: ctx.layers - 1], saved[ctx.layers - 1 :]
        layers = _pairs(parameters)
        columns = [len(bias) for _, bias in layers]
        sums = partial_sums(product, sum(columns))
        by_layer = sums.split(columns, dim=1)
        grad = unit_rows_backward(grad.contiguous(), product, layers[-1][1], factor, by_layer[-1])
        grad_weights = [weight_gradient(grad, entering[-1], layers[-1][0])]
        for i in reversed(range(len(before_gelu))):
            after = in_dtype(layers[i + 1][0], grad.dtype)
            grad, _ = linear_gelu_backward(
                grad, after, before_gelu[i], layers[i][1], by_layer[i], with_active=False
            )
            grad_weights.insert(0, weight_gradient(grad, entering[i], layers[i][0]))
        grad_x = grad @ in_dtype(layers[0][0], grad.dtype) if ctx.needs_input_grad[0] else None
        grad_biases = column_sums(sums).split(columns)
        pairs = zip(grad_weights, grad_biases, strict=True)
        return (
            None if grad_x is None else grad_x.to(ctx.x_dtype),
            *(None, None, *(gradient for pair in pairs for gradient in pair)),
        )


def _pairs(parameters: Any) -> list[tuple[Tensor, Tensor]]:
    return list(zip(parameters[::2], parameters[1::2], strict=True))


def fused_prototypes(units: list[Tensor], direction: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    """Logits [R, K] of one or two tensors of unit vectors [R, D], over the same prototypes."""
    return _Prototypes.apply(direction, length, product_dtype(units[0]), *units)


class _Prototypes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, direction: Tensor, length: Tensor, dtype: torch.dtype, *units: Tensor
    ) -> tuple[Tensor, ...]:
        with torch.autocast(direction.device.type, enabled=False):
            weight, _ = weight_norm(direction, length, dtype)
            halves = [unit.to(dtype) for unit in units]
            logits = tuple(half @ weight.t() for half in halves)
        ctx.save_for_backward(direction, length, weight, *halves)
        ctx.dtypes = [unit.dtype for unit in units]
        return logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        direction, length, weight, *units = ctx.saved_tensors
        pairs = zip(grads, units, strict=True)
        grad_weights = [weight_gradient(grad, unit, direction) for grad, unit in pairs]
        grad_direction, grad_length = weight_norm_backward(grad_weights, direction, length)
        grad_units = [
            (grad @ weight).to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return grad_direction, grad_length, None, *grad_units
