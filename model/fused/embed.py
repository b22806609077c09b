"""The embedding of all crop sizes as one autograd function over the kernels of
`model.kernels.embed_tokens`, with one product for all patches.

`VisionTransformer.embed` is the reference. In shapes: T tokens, L patches of all sizes, D values
of a patch, C channels.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ibeton.model.backbones.blocks import Shapes
from ibeton.model.kernels.column_sums import column_sums
from ibeton.model.kernels.embed_tokens import (
    PROGRAMS,
    Added,
    embed_tokens,
    embed_tokens_backward,
)
from ibeton.model.kernels.half_weights import in_dtype, product_dtype, weight_gradient


def fused_embed(
    patches: list[Tensor],  # [B, h, w, in_chans, P, P] of each crop size, views of the images
    masks: list[Tensor | None],  # bool [B, h, w] of each
    tables: list[Tensor],  # [1, 1 + h * w, C] of each
    weight: Tensor,  # [C, in_chans, P, P]
    bias: Tensor,
    cls_token: Tensor,
    masked_embed: Tensor | None,
) -> tuple[Tensor, Shapes]:
    """Tokens float32 [T, C] of all crop sizes, and their shapes."""
    shapes = [(len(size), size.shape[1] * size.shape[2] + 1) for size in patches]
    packed = _pack(patches, product_dtype(patches[0]))
    flat_masks = [None if mask is None else mask.flatten() for mask in masks]
    arguments = (weight, bias, cls_token, masked_embed, *tables)
    return _Embed.apply(packed, flat_masks, shapes, *arguments), shapes


def _pack(patches: list[Tensor], dtype: torch.dtype) -> Tensor:
    """[L, D] in `dtype`: one kernel per crop size casts and copies."""
    counts = [size.shape[:3].numel() for size in patches]
    packed = patches[0].new_empty(sum(counts), patches[0].shape[3:].numel(), dtype=dtype)
    for size, rows in zip(patches, packed.split(counts), strict=True):
        rows.view(size.shape).copy_(size)
    return packed


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        packed: Tensor,
        masks: list[Tensor | None],
        shapes: Shapes,
        weight: Tensor,
        bias: Tensor,
        cls_token: Tensor,
        masked_embed: Tensor | None,
        *tables: Tensor,
    ) -> Tensor:
        with torch.autocast(packed.device.type, enabled=False):
            product = packed @ in_dtype(weight, packed.dtype).flatten(1).t()
        counts = [images * tokens for images, tokens in shapes]
        tokens = torch.empty(sum(counts), len(weight), dtype=torch.float32, device=packed.device)
        parts = zip(_by_size(product, shapes), masks, tables, tokens.split(counts), strict=True)
        for part, mask, table, out in parts:
            embed_tokens(part, mask, Added(bias, cls_token, table, masked_embed), out)
        ctx.save_for_backward(packed, weight, cls_token, masked_embed, *masks)
        ctx.shapes = shapes
        return tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        packed, weight, cls_token, masked_embed, *masks = ctx.saved_tensors
        width, shapes = len(weight), ctx.shapes
        grad_product = packed.new_empty(len(packed), width)
        columns = [2 * tokens * width for _, tokens in shapes]
        partial = grad.new_empty(PROGRAMS, sum(columns))
        counts = [images * tokens for images, tokens in shapes]
        parts = zip(
            grad.contiguous().split(counts),
            masks,
            _by_size(grad_product, shapes),
            partial.split(columns, dim=1),
            strict=True,
        )
        for part, mask, out, sums in parts:
            embed_tokens_backward(part, mask, out, sums)
        grad_weight = weight_gradient(grad_product, packed, weight).view_as(weight)
        by_size = [s.view(2, -1, width) for s in column_sums(partial).split(columns)]
        # Of each crop size, over all patches and over those that are not masked.
        every, seen = reduce(torch.add, [sums[:, 1:].sum(dim=1) for sums in by_size])
        grad_cls = reduce(torch.add, [sums[0, 0] for sums in by_size]).view_as(cls_token)
        return (
            *(None, None, None, grad_weight, seen, grad_cls),
            None if masked_embed is None else (every - seen).view_as(masked_embed),
            *(sums[:1] for sums in by_size),
        )


def _by_size(patches: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
    """[L, C] -> the patches of each crop size."""
    return patches.split([images * (tokens - 1) for images, tokens in shapes])
