"""The transformer block on packed tokens, under timm's parameter names.

Packed means: the tokens of all images of all crop sizes, one after the other in one tensor [T, C],
with `shapes`, one (images, tokens per image) for each crop size. Norms, projections and MLPs
see [T, C]; attention runs once for each crop size. In shapes: H attention heads, D = C / H.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibeton.model.config import ModelConfig
from ibeton.model.host_inputs import from_host
from ibeton.model.kernels.library_attention import split_heads
from ibeton.model.kernels.recomputing import gelu_linear, norm_linear

LAYERNORM_EPS = 1e-6  # the original Swin and timm's have 1e-5, which moves tokens by 4e-5
LayerNorm = partial(nn.LayerNorm, eps=LAYERNORM_EPS)
INIT_STD = 0.02

Shapes = list[tuple[int, int]]  # (images, tokens per image) of each crop size
Branch = Callable[[Tensor, Shapes], Tensor]


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights and zero biases for linear layers; others do not change.

    The values are cut at +-2, a hundred standard deviations away (published code).
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_masks(
    masks: Tensor, expected: list[int], covers: str, masked_embed: nn.Parameter | None
) -> Tensor:
    """`masked_embed`, which replaces what is masked. Raises ValueError if the backbone has none, or
    if the masks are not bool of the `expected` shape, one value per what it `covers`."""
    if masked_embed is None:
        raise ValueError("masks for a backbone without masked_embed: only a student has it")
    if list(masks.shape) != expected or masks.dtype != torch.bool:
        raise ValueError(
            f"masks are {masks.dtype} {list(masks.shape)}: expected bool {expected},"
            f" one value per {covers}"
        )
    return masked_embed


class Kept(NamedTuple):
    """The samples that stochastic depth keeps in a residual branch."""

    tokens: Tensor | None  # int64 [T'], the indices of their tokens; None: see `factor`
    shapes: Shapes  # what the kept tokens are
    scale: float  # 1 / (1 - rate)
    factor: Tensor | None  # [T, 1], 0 or `scale`; None: the tokens are gathered


def draw_kept(
    rates: list[float], shapes: Shapes, device: torch.device, fused: bool = False
) -> list[Kept | None]:
    """For each branch with its rate, the samples it keeps: each is dropped independently with that
    probability. None for a rate of 0.

    Drawn from the CPU's generator, so that the host knows how many are kept without asking the
    device. On a CPU the branch then runs on the kept samples alone. On CUDA, and where the blocks
    are `fused`, it runs on all: allocator and graphs need shapes that stay the same, and the
    published rates would save only 5 % of the arithmetic.
    """
    samples = sum(images for images, _ in shapes)
    if device.type == "cpu" and not fused:
        lengths = torch.tensor([tokens for images, tokens in shapes for _ in range(images)])
        token_of = torch.arange(samples).repeat_interleave(lengths)  # [T], the token's sample
        return [
            None if rate == 0 else _gathered(row, token_of, rate, shapes)
            for rate, row in zip(rates, _draw(rates, samples), strict=True)
        ]

    def factor() -> Tensor:
        return _draw(rates, samples) / (1 - torch.tensor(rates).unsqueeze(1))

    return spread_kept(from_host(factor, device), rates, shapes)


def spread_kept(factors: Tensor, rates: list[float], shapes: Shapes) -> list[Kept | None]:
    """`factors` [branches, samples], 0 or 1 / (1 - rate) -> the same for each token."""
    counts = [images for images, _ in shapes]
    spread = factors.new_empty(len(rates), sum(images * tokens for images, tokens in shapes))
    by_size = spread.split([images * tokens for images, tokens in shapes], dim=1)
    for out, part, (_, tokens) in zip(by_size, factors.split(counts, dim=1), shapes, strict=True):
        out.unflatten(1, (-1, tokens)).copy_(part.unsqueeze(2))
    return [
        None if rate == 0 else Kept(None, shapes, 1 / (1 - rate), spread[i].unsqueeze(1))
        for i, rate in enumerate(rates)
    ]


def _draw(rates: list[float], samples: int) -> Tensor:
    """bool [branches, samples] on the CPU, True = kept."""
    return torch.rand(len(rates), samples) >= torch.tensor(rates).unsqueeze(1)


def _gathered(kept: Tensor, token_of: Tensor, rate: float, shapes: Shapes) -> Kept:
    counts = kept.split([images for images, _ in shapes])
    kept_shapes = [
        (int(count.sum()), tokens) for count, (_, tokens) in zip(counts, shapes, strict=True)
    ]
    tokens = kept[token_of].nonzero().squeeze(1)
    return Kept(tokens, kept_shapes, 1 / (1 - rate), None)


def among(kept: Kept, rows: Tensor, total: int) -> Kept:
    """The same samples, for a branch that runs on the tokens `rows` int64 [R] of all `total`, each
    by itself."""
    if kept.tokens is None:
        assert kept.factor is not None
        return kept._replace(factor=kept.factor.index_select(0, rows))
    flags = torch.zeros(total, dtype=torch.bool)
    flags[kept.tokens] = True
    return kept._replace(tokens=flags[rows].nonzero().squeeze(1))


def add_branch(x: Tensor, branch: Branch, shapes: Shapes, kept: Kept | None) -> Tensor:
    """x [T, C] plus the branch of it, where stochastic depth keeps it."""
    if kept is None:
        return x + branch(x, shapes)
    if kept.tokens is None:
        assert kept.factor is not None
        return x + branch(x, shapes) * kept.factor
    out = branch(x.index_select(0, kept.tokens), kept.shapes)
    return x.index_add(0, kept.tokens, out.to(x.dtype), alpha=kept.scale)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's attention, [B, H, N, D] each. In float32 where bfloat16 tensors are on a CPU: the
    library's backward takes seven times as long in bfloat16 there."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(query, key, value)
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    return out.to(query.dtype)


class Attention(nn.Module):
    """Multi-head self-attention within each image."""

    def __init__(self, embed_dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def split_heads(self, qkv: Tensor, images: int, tokens: int) -> tuple[Tensor, ...]:
        """Output of `qkv` [images * tokens, 3C] -> query, key, value [images, H, tokens, D]."""
        return split_heads(qkv, images, tokens, self.num_heads)

    def forward(self, qkv: Tensor, shapes: Shapes) -> Tensor:
        """Output of `qkv` [T, 3C] -> [T, C]. One attention and one projection per crop
        size: projecting them together would need a copy of all outputs."""
        outs = []
        parts = qkv.split([images * tokens for images, tokens in shapes])
        for part, (images, tokens) in zip(parts, shapes, strict=True):
            if images:
                out = attend(*self.split_heads(part, images, tokens))  # [B, H, N, D]
                outs.append(self.proj(out.transpose(1, 2).flatten(2).flatten(0, 1)))
        if not outs:  # stochastic depth dropped everything; gradients are zero, not missing
            return self.proj(qkv[:, : self.proj.in_features])
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class Mlp(nn.Module):
    """Two linear layers with exact GELU between."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block on packed tokens, with stochastic depth and optional layer scale.

    With recomputing, the backward keeps the branches' inputs, query, key, value, the output of
    attention and the input of the GELU; it computes norms and GELU again (`model.kernels`).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        embed_dim, _, num_heads = config.backbone_shape()
        self.recompute = config.recompute != "off"
        self.gamma_1: nn.Parameter | None = None
        self.gamma_2: nn.Parameter | None = None
        if config.layer_scale > 0:
            self.gamma_1 = nn.Parameter(torch.full((embed_dim,), config.layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((embed_dim,), config.layer_scale))
        self.norm1 = LayerNorm(embed_dim)
        self.attn = Attention(embed_dim, num_heads, config.qkv_bias)
        self.norm2 = LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, int(embed_dim * config.mlp_ratio))

    def attention_branch(self, x: Tensor, shapes: Shapes) -> Tensor:
        if self.recompute:
            qkv = norm_linear(x, self.norm1, self.attn.qkv)
        else:
            qkv = self.attn.qkv(self.norm1(x))
        out = self.attn(qkv, shapes)
        return out if self.gamma_1 is None else self.gamma_1 * out

    def mlp_branch(self, x: Tensor, shapes: Shapes) -> Tensor:
        if self.recompute:
            out = gelu_linear(norm_linear(x, self.norm2, self.mlp.fc1), self.mlp.fc2)
        else:
            out = self.mlp(self.norm2(x))
        return out if self.gamma_2 is None else self.gamma_2 * out

    def forward(
        self,
        x: Tensor,  # [T, C]
        shapes: Shapes,
        kept_attention: Kept | None = None,
        kept_mlp: Kept | None = None,  # of the tokens that are wanted: see `among`
        rows: Tensor | None = None,  # int64 [R], the tokens that are wanted; None: all
    ) -> Tensor:
        """-> [T, C], or [R, C] with `rows`: the MLP, two thirds of the work, then runs on these
        alone, as no token after the attention needs another."""
        x = add_branch(x, self.attention_branch, shapes, kept_attention)
        if rows is not None:
            x = x.index_select(0, rows)
        return add_branch(x, self.mlp_branch, shapes, kept_mlp)
