"""PyTorch's attention on packed tokens, once per crop size, and one kernel per size that packs the
gradients of query, key and value into one tensor and sums the bias gradient in the same pass.

In shapes: T tokens of all crop sizes, B images of one size with N tokens each, H heads, D channels
per head, C = H * D, P programs of a backward.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ibeton.model.kernels.column_sums import shares
from ibeton.model.kernels.launch import jit, launch, row_tile, tl


class LibraryCall(NamedTuple):
    """PyTorch's attention of one crop size; each tensor [B, H, N, D]."""

    query: Tensor  # as key and value a view of the packed tensor
    key: Tensor
    value: Tensor
    out: Tensor  # with PyTorch's graph behind it


def split_heads(qkv: Tensor, images: int, tokens: int, num_heads: int) -> tuple[Tensor, ...]:
    """[B * N, 3C] -> query, key and value, each a view [B, H, N, D]."""
    heads = qkv.view(images, tokens, 3, num_heads, -1)
    return heads.permute(2, 0, 3, 1, 4).unbind()


def library_attention(
    qkv: Tensor,  # [T, 3C]
    shapes: list[tuple[int, int]],
    num_heads: int,
    with_grad: bool,
) -> tuple[Tensor, list[LibraryCall]]:
    """-> [T, C], and what the backward needs."""
    out, calls = qkv.new_empty(len(qkv), qkv.shape[1] // 3), []
    counts = [images * tokens for images, tokens in shapes]
    parts = zip(qkv.split(counts), out.split(counts), shapes, strict=True)
    for part, rows, (images, tokens) in parts:
        with torch.set_grad_enabled(with_grad):
            leaf = part.detach().requires_grad_(with_grad)
            query, key, value = split_heads(leaf, images, tokens, num_heads)
            heads = F.scaled_dot_product_attention(query, key, value)
        rows.view(images, tokens, num_heads, -1).copy_(heads.detach().transpose(1, 2))
        calls.append(LibraryCall(query, key, value, heads))
    return out, calls


def library_attention_backward(
    grad: Tensor,  # [T, C]
    calls: list[LibraryCall],
    partial: Tensor,  # float32 [P, 3C], a view; receives the sums over tokens
) -> Tensor:
    """The gradient of the packed query, key and value [T, 3C]. PyTorch's graph is consumed."""
    grad_qkv = grad.new_empty(len(grad), partial.shape[1])
    counts = [call.out.shape[0] * call.out.shape[2] for call in calls]
    parts = zip(
        grad.split(counts), grad_qkv.split(counts), shares(partial, counts), calls, strict=True
    )
    for upstream, out, sums, call in parts:
        images, heads, tokens, _ = call.out.shape
        upstream = upstream.view(images, tokens, heads, -1).transpose(1, 2)
        inputs = (call.query, call.key, call.value)
        pack_gradients(list(torch.autograd.grad(call.out, inputs, upstream)), out, sums)
    return grad_qkv


def pack_gradients_reference(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Three [B, H, N, D] -> [B * N, 3C], and its sum over the rows in float32."""
    packed = torch.stack(grads).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
    return packed, packed.float().sum(dim=0)


def pack_gradients(grads: list[Tensor], out: Tensor, partial: Tensor) -> None:
    """`pack_gradients_reference` by the kernel, into `out` [B * N, 3C] and `partial` float32 [P,
    3C], a view, whose rows add up to the sum."""
    if len({grad.stride() for grad in grads}) > 1 or grads[0].stride(3) != 1:
        grads = [grad.contiguous() for grad in grads]
    _, heads, tokens, channels = grads[0].shape
    launch(
        _pack_gradients_kernel,
        (len(partial),),
        *grads,
        out,
        partial,
        *grads[0].stride()[:3],
        partial.stride(0),
        len(out),
        tokens,
        CHANNELS=channels,
        **row_tile(heads * channels),
    )


@jit
def _pack_gradients_kernel(  # type: ignore[no-untyped-def]
    query,  # [B, H, N, D], as key and value with the strides below
    key,
    value,
    out,  # [B * N, 3C], out
    partial,  # float32 [P, stride], out
    image_stride,
    head_stride,
    token_stride,
    partial_stride,
    rows,  # B * N
    tokens,  # N
    WIDTH: tl.constexpr,  # C
    CHANNELS: tl.constexpr,  # D
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, C at least
):
    """Every P-th tile of rows, and the sums over them."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    query_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    key_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    value_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        source = (row // tokens * image_stride + row % tokens * token_stride)[:, None]
        source += (column // CHANNELS * head_stride + column % CHANNELS)[None, :]
        target = out + row[:, None] * (3 * WIDTH) + column[None, :]
        q = tl.load(query + source, mask=mask, other=0.0)
        tl.store(target, q, mask=mask)
        query_sum += q.to(tl.float32)
        k = tl.load(key + source, mask=mask, other=0.0)
        tl.store(target + WIDTH, k, mask=mask)
        key_sum += k.to(tl.float32)
        v = tl.load(value + source, mask=mask, other=0.0)
        tl.store(target + 2 * WIDTH, v, mask=mask)
        value_sum += v.to(tl.float32)
    partial += program.to(tl.int64) * partial_stride + column
    tl.store(partial, tl.sum(query_sum, axis=0), mask=inside)
    tl.store(partial + WIDTH, tl.sum(key_sum, axis=0), mask=inside)
    tl.store(partial + 2 * WIDTH, tl.sum(value_sum, axis=0), mask=inside)
