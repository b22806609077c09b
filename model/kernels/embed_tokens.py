"""From the products of patches to the tokens that enter the first block, in one pass.

The pass adds the bias, replaces masked patches by the mask token, puts the class token before the
patches of each image, and adds the position table. The backward, also one pass, sums the gradients
of all of these.

In shapes: B images of one crop size with N patches each, C channels, P programs for each token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ibeton.model.kernels.launch import jit, launch, row_tile, tl, triton

PROGRAMS = 8  # for each token of an image


class Added(NamedTuple):
    """What is added to patches, or replaces them. All float32."""

    bias: Tensor  # [C]
    cls_token: Tensor  # [1, 1, C]
    table: Tensor  # [1, 1 + N, C]
    masked_embed: Tensor | None = None  # [1, C]


def embed_tokens_reference(product: Tensor, masks: Tensor | None, added: Added) -> Tensor:
    """product [B * N, C], masks bool [B, N] -> tokens float32 [B * (1 + N), C]."""
    patches = (product.float() + added.bias).unflatten(0, (-1, added.table.shape[1] - 1))
    if masks is not None and added.masked_embed is not None:
        patches = torch.where(masks.unsqueeze(2), added.masked_embed, patches)
    cls = added.cls_token.expand(len(patches), -1, -1)
    return (torch.cat([cls, patches], dim=1) + added.table).flatten(0, 1)


def embed_tokens(product: Tensor, masks: Tensor | None, added: Added, out: Tensor) -> None:
    """`embed_tokens_reference` by the kernel, into `out` float32 [B * (1 + N), C]."""
    rows, width = out.shape
    tile = row_tile(width)
    launch(
        _embed_kernel,
        (triton.cdiv(rows, tile["ROWS"]),),
        product,
        masks,
        added.bias,
        added.cls_token,
        added.table,
        added.masked_embed if masks is not None else None,
        out,
        rows,
        added.table.shape[1],
        **tile,
    )


def embed_tokens_backward(
    grad: Tensor,  # float32 [B * (1 + N), C]
    masks: Tensor | None,
    grad_product: Tensor,  # [B * N, C], out
    partial: Tensor,  # float32 [P, 2 * (1 + N) * C], a view; see below
) -> None:
    """The gradient of the products, zero where masked. In `partial` the sums over images, by token:
    of all, then of those that are not masked. The class token is never masked."""
    width = grad.shape[1]
    tokens = partial.shape[1] // (2 * width)
    tile = row_tile(width)
    if tile["BLOCK"] >= 1024:
        tile["num_warps"] = 8
    launch(
        _embed_backward_kernel,
        (tokens, len(partial)),
        grad,
        masks,
        grad_product,
        partial,
        partial.stride(0),
        len(grad) // tokens,
        tokens,
        **tile,
    )


@jit
def _embed_kernel(  # type: ignore[no-untyped-def]
    product,  # [B * N, C]
    masks,  # bool [B * N] or None
    bias,  # float32 [C]
    cls_token,  # float32 [C]
    table,  # float32 [1 + N, C]
    masked_embed,  # float32 [C] or None
    out,  # float32 [B * (1 + N), C], out
    rows,  # B * (1 + N)
    tokens,  # 1 + N
    WIDTH: tl.constexpr,  # C
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, C at least
):
    """One tile of whole rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    mask = (row < rows)[:, None] & inside[None, :]
    place = row % tokens
    patch = row - row // tokens - 1
    is_patch = (row < rows) & (place > 0)
    source = product + patch[:, None] * WIDTH + column[None, :]
    value = tl.load(source, mask=is_patch[:, None] & inside[None, :], other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=inside, other=0.0)[None, :]
    if masks is not None:
        masked = tl.load(masks + patch, mask=is_patch, other=0) != 0
        token = tl.load(masked_embed + column, mask=inside, other=0.0)
        value = tl.where(masked[:, None], token[None, :], value)
    cls = tl.load(cls_token + column, mask=inside, other=0.0)
    value = tl.where(is_patch[:, None], value, cls[None, :])
    value += tl.load(table + place[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
    tl.store(out + row[:, None] * WIDTH + column[None, :], value, mask=mask)


@jit
def _embed_backward_kernel(  # type: ignore[no-untyped-def]
    grad,  # float32 [B * (1 + N), C]
    masks,  # bool [B * N] or None
    grad_product,  # [B * N, C], out
    partial,  # float32 [P, stride], out
    partial_stride,
    images,  # B
    tokens,  # 1 + N
    WIDTH: tl.constexpr,  # C
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token of every P-th tile of images, and the sums over them."""
    place = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    seen = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(tl.program_id(1) * ROWS, images, tl.num_programs(1) * ROWS):
        image = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (image < images)[:, None] & inside[None, :]
        row = image * tokens + place
        value = tl.load(grad + row[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
        total += value
        patch = row - image - 1
        is_patch = (image < images) & (place > 0)
        if masks is not None:
            masked = tl.load(masks + patch, mask=is_patch, other=0) != 0
            value = tl.where(masked[:, None], 0.0, value)
        seen += value
        target = grad_product + patch[:, None] * WIDTH + column[None, :]
        value = value.to(grad_product.dtype.element_ty)
        tl.store(target, value, mask=is_patch[:, None] & inside[None, :])
    partial += tl.program_id(1).to(tl.int64) * partial_stride + place * WIDTH + column
    tl.store(partial, tl.sum(total, axis=0), mask=inside)
    tl.store(partial + tokens * WIDTH, tl.sum(seen, axis=0), mask=inside)
