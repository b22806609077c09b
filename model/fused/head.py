"""The projection head as two autograd functions over the Triton kernels of `model.kernels`: tokens
to unit vectors, and unit vectors to logits.

`IBOTHead` is the reference. Products run in the dtype of autocast; lengths, biases, sums and
weight gradients are float32. In shapes: R tokens, C channels, D of the bottleneck, K prototypes.
"""

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ibeton.model.kernels.bias_gelu import bias_gelu_backward, bias_gelu_forward
from ibeton.model.kernels.column_sums import column_sums, partial_sums
from ibeton.model.kernels.half_weights import in_dtype, product_dtype, weight_gradient
from ibeton.model.kernels.head.unit_rows import unit_rows, unit_rows_backward
from ibeton.model.kernels.head.weight_norm import weight_norm, weight_norm_backward


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
    dtype = product_dtype(x)
    weights, biases = [in_dtype(weight, dtype) for weight, _ in layers], [b for _, b in layers]
    with torch.autocast(x.device.type, enabled=False):
        *_, product = _products(x.to(dtype), weights, biases, keep=False)
        partial = partial_sums(product, product.shape[1])
        units, _ = unit_rows(product, biases[-1], partial, tokens)
    return units, column_sums(partial) / (len(x) - len(x) // tokens)


def _products(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], keep: bool
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """What enters each layer and each GELU (if they are kept), and the last layer's output without
    its bias. The weights are in the dtype of x."""
    entering, before_gelu = [x], []
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        inner = x @ weight.t()
        x = bias_gelu_forward(inner, bias, in_place=not keep)
        if keep:
            entering.append(x)
            before_gelu.append(inner)
    return entering, before_gelu, x @ weights[-1].t()


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, needs_grad: bool, *parameters: Tensor
    ) -> Tensor:
        weights = [in_dtype(weight, dtype) for weight in parameters[::2]]
        biases = list(parameters[1::2])
        with torch.autocast(x.device.type, enabled=False):
            entering, before_gelu, product = _products(x.to(dtype), weights, biases, needs_grad)
            units, factor = unit_rows(product, biases[-1])
        if needs_grad:
            ctx.save_for_backward(product, factor, *entering, *before_gelu, *weights, *parameters)
        ctx.x_dtype, ctx.layers = x.dtype, len(weights)
        return units

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        product, factor, *rest = ctx.saved_tensors
        layers, saved = ctx.layers, iter(rest)
        entering, before_gelu, weights, parameters = (
            list(islice(saved, count)) for count in (layers, layers - 1, layers, 2 * layers)
        )
        originals, biases = parameters[::2], parameters[1::2]
        columns = [len(bias) for bias in biases]
        sums = partial_sums(product, sum(columns))
        by_layer = sums.split(columns, dim=1)
        grad = unit_rows_backward(grad.contiguous(), product, biases[-1], factor, by_layer[-1])
        grad_weights = [weight_gradient(grad, entering[-1], originals[-1])]
        for i in reversed(range(layers - 1)):
            grad, _ = bias_gelu_backward(
                grad @ weights[i + 1], before_gelu[i], biases[i], by_layer[i], in_place=True
            )
            grad_weights.insert(0, weight_gradient(grad, entering[i], originals[i]))
        grad_x = (grad @ weights[0]).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        pairs = zip(grad_weights, column_sums(sums).split(columns), strict=True)
        return grad_x, None, None, *(gradient for pair in pairs for gradient in pair)


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


def target_logits(
    cls: Tensor, patches: Tensor, mean: Tensor, direction: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [R, K] of unit vectors of class tokens and of patches, in the dtype of products, and
    of a mean of unit vectors, float32 [K]. Without gradient."""
    dtype = product_dtype(cls)
    weight, exact = weight_norm(direction, length, dtype, exact=True)
    assert exact is not None
    with torch.autocast(cls.device.type, enabled=False):
        return cls.to(dtype) @ weight.t(), patches.to(dtype) @ weight.t(), exact @ mean
