"""Self-attention on packed tokens: one kernel for all crop sizes forward, and one backward that
writes the gradients of query, key and value into one tensor and sums the bias gradient as well.

The kernels need matrix units that Triton can use, those of sm_80 and later in half precision, and
heads of at most 64 channels. Elsewhere PyTorch's attention runs (`library_attention`).

In shapes: T tokens of all crop sizes, B images of one size with N tokens each, H heads, D channels
per head, C = H * D, P programs of a backward.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibeton.model.kernels.column_sums import shares
from ibeton.model.kernels.launch import (
    Launch,
    interpreted,
    jit,
    launch,
    matrix_units,
    tl,
    triton,
)
from ibeton.model.kernels.library_attention import (
    LibraryCall,
    library_attention,
    library_attention_backward,
    split_heads,
)

TOKENS = 64  # of a tile of queries or keys
STEP = 32  # tokens that a backward takes at a time; more would not fit into registers
CHANNELS = 64  # per head at most; more would not fit either

Shapes = list[tuple[int, int]]  # (images, tokens per image) of each crop size


class Attended(NamedTuple):
    """The attention of all crop sizes, with what its backward needs."""

    out: Tensor  # [T, C]
    qkv: Tensor  # [T, 3C]
    shapes: Shapes
    num_heads: int
    log_sum: Tensor | None  # float32 [H, T], logarithm to base 2 of the softmax's denominator
    calls: list[LibraryCall]  # empty if the kernels ran


def attention_reference(qkv: Tensor, images: int, tokens: int, num_heads: int) -> Tensor:
    """qkv [B * N, 3C] -> [B * N, C], with the softmax in memory."""
    query, key, value = split_heads(qkv, images, tokens, num_heads)
    weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).flatten(2).flatten(0, 1)


def attend(qkv: Tensor, shapes: Shapes, num_heads: int, with_grad: bool) -> Attended:
    """qkv [T, 3C] -> attention within each image."""
    if not matrix_units(qkv) or qkv.shape[1] > 3 * CHANNELS * num_heads:
        out, calls = library_attention(qkv, shapes, num_heads, with_grad)
        return Attended(out, qkv, shapes, num_heads, None, calls)
    out = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
    log_sum = torch.empty(num_heads, len(qkv), dtype=torch.float32, device=qkv.device)
    for pair in _pairs(shapes):
        grid = (pair.tiles(), num_heads)
        constants = _constants(qkv, num_heads)
        launch(_attention_kernel, grid, qkv, out, log_sum, len(qkv), *pair, **constants)
    return Attended(out, qkv, shapes, num_heads, log_sum, [])


def attention_backward(
    grad: Tensor,  # [T, C]
    attended: Attended,
    partial: Tensor,  # float32 [P, 3C], a view; receives the sums over tokens
) -> Tensor:
    """The gradient of the packed query, key and value [T, 3C]."""
    if attended.log_sum is None:
        return library_attention_backward(grad, attended.calls, partial)
    grad_qkv, pairs = torch.empty_like(attended.qkv), list(_pairs(attended.shapes))
    parts = shares(partial, [pair.tiles() for pair in pairs])
    for pair, sums in zip(pairs, parts, strict=True):
        launch(
            _attention_backward_kernel,
            (len(sums), attended.num_heads, 2),
            attended.qkv,
            attended.out,
            grad,
            attended.log_sum,
            grad_qkv,
            sums,
            sums.stride(0),
            len(attended.qkv),
            *pair,
            STEP=STEP,
            **_constants(attended.qkv, attended.num_heads),
        )
    return grad_qkv


def attention_flops(launch: Launch) -> int:
    """Operations of the products of an attention kernel, as if no tile were cut off and nothing
    were computed twice. 0 for other kernels."""
    forward = launch.kernel is _attention_kernel
    if not forward and launch.kernel is not _attention_backward_kernel:
        return 0
    named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    pairs = ((named["images"], named["tokens"]), (named["more_images"], named["more_tokens"]))
    products = 2 if forward else 5
    scores = sum(images * tokens**2 for images, tokens in pairs)
    return 2 * products * scores * launch.constants["WIDTH"]


class _Pair(NamedTuple):
    """Two crop sizes that share a launch; the second may have no images."""

    start: int  # row of the first token
    images: int
    tokens: int
    more_images: int
    more_tokens: int

    def tiles(self) -> int:
        """Tiles of queries of each head."""
        parts = ((self.images, self.tokens), (self.more_images, self.more_tokens))
        return sum(images * triton.cdiv(tokens, TOKENS) for images, tokens in parts)


def _pairs(shapes: Shapes) -> Iterator[_Pair]:
    start = 0
    for i in range(0, len(shapes), 2):
        first, second = [*shapes[i : i + 2], (0, 1)][:2]
        yield _Pair(start, *first, *second)
        start += first[0] * first[1] + second[0] * second[1]


def _constants(qkv: Tensor, num_heads: int) -> dict[str, Any]:
    width = qkv.shape[1] // 3
    channels = width // num_heads
    return {
        **{"WIDTH": width, "CHANNELS": channels, "SCALE": channels**-0.5, "TOKENS": TOKENS},
        "BLOCK": max(16, triton.next_power_of_2(channels)),
        "WIDE": interpreted(),  # it multiplies by NumPy, which has no bfloat16
        **{"num_warps": 4, "num_stages": 3},
    }


@jit
def _place(index, start, images, tokens, more_images, more_tokens, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """First row of the image of a tile, its tokens, and the tile's number within the image."""
    tiles = (tokens + TOKENS - 1) // TOKENS
    more_tiles = (more_tokens + TOKENS - 1) // TOKENS
    first = images * tiles
    is_first = index < first
    index = tl.where(is_first, index, index - first)
    tiles = tl.where(is_first, tiles, more_tiles)
    length = tl.where(is_first, tokens, more_tokens)
    row = start + tl.where(is_first, 0, images * tokens)
    return (row + index // tiles * length).to(tl.int64), length, index % tiles


@jit
def _product(a, b, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """a @ b in float32."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@jit
def _attention_kernel(  # type: ignore[no-untyped-def]
    qkv,  # [T, 3C]
    out,  # [T, C], out
    log_sum,  # float32 [H, T], out
    all_tokens,  # T
    start,  # as `_Pair`
    images,
    tokens,
    more_images,
    more_tokens,
    WIDTH: tl.constexpr,  # C
    CHANNELS: tl.constexpr,  # D
    SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, D at least
    WIDE: tl.constexpr,
):
    """A tile of queries of one image and head against all its keys, with an online softmax."""
    head = tl.program_id(1)
    row, length, tile = _place(
        tl.program_id(0), start, images, tokens, more_images, more_tokens, TOKENS
    )
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    qkv += row * (3 * WIDTH) + head * CHANNELS
    query = tile * TOKENS + tl.arange(0, TOKENS)
    valid = query < length
    mask = valid[:, None] & inside[None, :]
    q = tl.load(qkv + query[:, None] * (3 * WIDTH) + channel[None, :], mask=mask, other=0.0)
    top = tl.full([TOKENS], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    result = tl.zeros([TOKENS, BLOCK], tl.float32)
    for at in range(0, length, TOKENS):
        key = at + tl.arange(0, TOKENS)
        seen = key < length
        source = qkv + WIDTH + key[:, None] * (3 * WIDTH) + channel[None, :]
        mask = seen[:, None] & inside[None, :]
        k = tl.load(source, mask=mask, other=0.0)
        v = tl.load(source + WIDTH, mask=mask, other=0.0)
        score = _product(q, tl.trans(k), WIDE) * (SCALE * 1.4426950408889634)
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weight, axis=1)
        result = result * shrink[:, None] + _product(weight.to(v.dtype), v, WIDE)
        top = higher
    result /= total[:, None]
    target = out + (row + query)[:, None] * WIDTH + head * CHANNELS + channel[None, :]
    mask = valid[:, None] & inside[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=mask)
    log_sum += head.to(tl.int64) * all_tokens + row + query
    tl.store(log_sum, top + tl.log2(total), mask=valid)


@jit
def _key_gradients(  # type: ignore[no-untyped-def]
    k,  # [TOKENS, BLOCK], a tile
    v,
    qkv,  # of the image and head, as the pointers below
    out,
    grad_out,
    log_sum,
    length,  # tokens of the image
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gradients of the tile's keys and values, float32, from all queries of the image."""
    channel = tl.arange(0, BLOCK)
    grad_k = tl.zeros([TOKENS, BLOCK], tl.float32)
    grad_v = tl.zeros([TOKENS, BLOCK], tl.float32)
    for start in range(0, length, STEP):
        query = start + tl.arange(0, STEP)
        seen = query < length
        mask = seen[:, None] & (channel < CHANNELS)[None, :]
        q = tl.load(qkv + query[:, None] * (3 * WIDTH) + channel[None, :], mask=mask, other=0.0)
        at = query[:, None] * WIDTH + channel[None, :]
        upstream = tl.load(grad_out + at, mask=mask, other=0.0)
        o = tl.load(out + at, mask=mask, other=0.0)
        along = tl.sum(o.to(tl.float32) * upstream.to(tl.float32), axis=1)
        below = tl.load(log_sum + query, mask=seen, other=0.0)
        score = _product(k, tl.trans(q), WIDE) * (SCALE * 1.4426950408889634)
        weight = tl.where(seen[None, :], tl.exp2(score - below[None, :]), 0.0)
        grad_v += _product(weight.to(v.dtype), upstream, WIDE)
        slope = weight * (_product(v, tl.trans(upstream), WIDE) - along[None, :])
        grad_k += _product(slope.to(k.dtype), q, WIDE)
    return grad_k * SCALE, grad_v


@jit
def _query_gradients(  # type: ignore[no-untyped-def]
    q,  # [TOKENS, BLOCK], a tile
    query,  # [TOKENS], its tokens
    mask,  # [TOKENS, BLOCK]
    qkv,  # as in `_key_gradients`
    out,
    grad_out,
    log_sum,
    length,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gradient of the tile's queries, float32, from all keys of the image."""
    channel = tl.arange(0, BLOCK)
    at = query[:, None] * WIDTH + channel[None, :]
    upstream = tl.load(grad_out + at, mask=mask, other=0.0)
    o = tl.load(out + at, mask=mask, other=0.0)
    along = tl.sum(o.to(tl.float32) * upstream.to(tl.float32), axis=1)
    below = tl.load(log_sum + query, mask=query < length, other=0.0)
    grad_q = tl.zeros([TOKENS, BLOCK], tl.float32)
    for start in range(0, length, STEP):
        key = start + tl.arange(0, STEP)
        seen = key < length
        near = seen[:, None] & (channel < CHANNELS)[None, :]
        source = qkv + WIDTH + key[:, None] * (3 * WIDTH) + channel[None, :]
        k = tl.load(source, mask=near, other=0.0)
        v = tl.load(source + WIDTH, mask=near, other=0.0)
        score = _product(q, tl.trans(k), WIDE) * (SCALE * 1.4426950408889634)
        weight = tl.where(seen[None, :], tl.exp2(score - below[:, None]), 0.0)
        slope = weight * (_product(upstream, tl.trans(v), WIDE) - along[:, None])
        grad_q += _product(slope.to(k.dtype), k, WIDE)
    return grad_q * SCALE


@jit
def _attention_backward_kernel(  # type: ignore[no-untyped-def]
    qkv,  # [T, 3C]
    out,  # [T, C]
    grad_out,  # [T, C]
    log_sum,  # float32 [H, T]
    grad,  # [T, 3C], out
    partial,  # float32 [P, stride], out
    partial_stride,
    all_tokens,  # T
    start,  # as `_Pair`
    images,
    tokens,
    more_images,
    more_tokens,
    WIDTH: tl.constexpr,  # C
    CHANNELS: tl.constexpr,  # D
    SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,  # tokens of a turn of the inner loops
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Every P-th tile, for one head. Half of the programs compute the gradients of its keys and
    values from all queries of the image, the other half that of its queries from all keys. Both
    compute the weights again."""
    head, of_keys = tl.program_id(1), tl.program_id(2) == 0
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    query_sum = tl.zeros([BLOCK], tl.float32)
    key_sum = tl.zeros([BLOCK], tl.float32)
    value_sum = tl.zeros([BLOCK], tl.float32)
    log_sum += head.to(tl.int64) * all_tokens
    tiles = images * ((tokens + TOKENS - 1) // TOKENS)
    tiles += more_images * ((more_tokens + TOKENS - 1) // TOKENS)
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, length, tile = _place(index, start, images, tokens, more_images, more_tokens, TOKENS)
        qkv_of = qkv + row * (3 * WIDTH) + head * CHANNELS
        out_of = out + row * WIDTH + head * CHANNELS
        grad_of = grad_out + row * WIDTH + head * CHANNELS
        own = tile * TOKENS + tl.arange(0, TOKENS)
        mask = (own < length)[:, None] & inside[None, :]
        at = own[:, None] * (3 * WIDTH) + channel[None, :]
        target = grad + row * (3 * WIDTH) + head * CHANNELS + at
        if of_keys:
            grad_k, grad_v = _key_gradients(
                tl.load(qkv_of + WIDTH + at, mask=mask, other=0.0),
                tl.load(qkv_of + 2 * WIDTH + at, mask=mask, other=0.0),
                *(qkv_of, out_of, grad_of, log_sum + row, length),
                *(WIDTH, CHANNELS, SCALE, TOKENS, STEP, BLOCK, WIDE),
            )
            tl.store(target + WIDTH, grad_k.to(grad.dtype.element_ty), mask=mask)
            tl.store(target + 2 * WIDTH, grad_v.to(grad.dtype.element_ty), mask=mask)
            key_sum += tl.sum(tl.where(mask, grad_k, 0.0), axis=0)
            value_sum += tl.sum(tl.where(mask, grad_v, 0.0), axis=0)
        else:
            grad_q = _query_gradients(
                tl.load(qkv_of + at, mask=mask, other=0.0),
                *(own, mask, qkv_of, out_of, grad_of, log_sum + row, length),
                *(WIDTH, CHANNELS, SCALE, TOKENS, STEP, BLOCK, WIDE),
            )
            tl.store(target, grad_q.to(grad.dtype.element_ty), mask=mask)
            query_sum += tl.sum(tl.where(mask, grad_q, 0.0), axis=0)
    partial += tl.program_id(0).to(tl.int64) * partial_stride + head * CHANNELS + channel
    if of_keys:
        tl.store(partial + WIDTH, key_sum, mask=inside)
        tl.store(partial + 2 * WIDTH, value_sum, mask=inside)
    else:
        tl.store(partial, query_sum, mask=inside)
