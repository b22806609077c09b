"""The vision transformer, under timm's parameter names.

In shapes: B images, N patch tokens, C channels, H attention heads, D = C / H.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERNORM_EPS = 1e-6
INIT_STD = 0.02


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights and zero biases for linear layers; others are left alone.

    The cut is at +-2 in absolute terms, a hundred standard deviations off (published code).
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: zero the whole of a sample's x [B, ...] with probability `rate`, and scale
    the others up so that the mean stays."""
    if not training or rate == 0:
        return x
    keep = 1 - rate
    kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
    return x * (kept / keep)


class PatchEmbed(nn.Module):
    """Images [B, in_chans, h*P, w*P] -> one embedding a patch, [B, C, h, w]."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Raises ValueError for a shape that the patches do not tile."""
        if x.dim() != 4 or x.shape[1] != self.proj.in_channels:
            raise ValueError(
                f"images of shape {list(x.shape)}: expected [B, {self.proj.in_channels}, H, W]"
            )
        height, width = x.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"images of {height} x {width} pixels are not a whole number of {self.patch_size}"
                f" pixel patches: crop to a multiple of --patch-size or change it"
            )
        return self.proj(x)


class Attention(nn.Module):
    """Multi-head self-attention over [B, T, C], T = 1 + N tokens."""

    def __init__(self, embed_dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def _query_key_value(self, x: Tensor) -> Tensor:
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, channels // self.num_heads)
        return qkv.permute(2, 0, 3, 1, 4)  # [3, B, H, T, D]

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self._query_key_value(x).unbind()
        out = F.scaled_dot_product_attention(query, key, value)  # [B, H, T, D]
        return self.proj(out.transpose(1, 2).flatten(2))

    def attention_map(self, x: Tensor) -> Tensor:
        """Softmax weights [B, H, T, T], rows are queries."""
        query, key, _ = self._query_key_value(x).unbind()
        return (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1)


class Mlp(nn.Module):
    """Two linear layers with exact GELU between."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block on [B, T, C], with stochastic depth and optional layer scale."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path_rate: float,
        layer_scale: float,
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.gamma_1: nn.Parameter | None = None
        self.gamma_2: nn.Parameter | None = None
        if layer_scale > 0:
            self.gamma_1 = nn.Parameter(torch.full((embed_dim,), layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((embed_dim,), layer_scale))
        self.norm1 = nn.LayerNorm(embed_dim, eps=LAYERNORM_EPS)
        self.attn = Attention(embed_dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(embed_dim, eps=LAYERNORM_EPS)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._branch(self.attn(self.norm1(x)), self.gamma_1)
        return x + self._branch(self.mlp(self.norm2(x)), self.gamma_2)

    def _branch(self, out: Tensor, gamma: Tensor | None) -> Tensor:
        out = out if gamma is None else gamma * out
        return drop_path(out, self.drop_path_rate, self.training)


class VisionTransformer(nn.Module):
    """ViT as iBOT trains it. State-dict names are timm's, plus `masked_embed` of the student.

    `image_size` is what the position table is made for; other sizes, oblong ones too, interpolate
    it. With `mean_pool` the class output is norm(mean of patch tokens), and patch tokens leave
    without a final norm. Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        patch_size: int = 16,
        image_size: int = 224,
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        layer_scale: float = 0.0,
        mean_pool: bool = False,
        masked_im_modeling: bool = False,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image size {image_size} is no multiple of patch size {patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"width {embed_dim} is not a multiple of {num_heads} attention heads")
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        grid = image_size // patch_size
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, embed_dim))
        self.masked_embed: nn.Parameter | None = None
        if masked_im_modeling:
            self.masked_embed = nn.Parameter(torch.zeros(1, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        # Stochastic depth grows linearly, from 0 in the first block.
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, rate, layer_scale) for rate in rates
        )
        norm = nn.LayerNorm(embed_dim, eps=LAYERNORM_EPS)
        self.norm = nn.Identity() if mean_pool else norm
        self.fc_norm = norm if mean_pool else None
        nn.init.trunc_normal_(self.cls_token, std=INIT_STD)
        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD)
        self.apply(init_linear)

    def position_embedding(self, height: int, width: int) -> Tensor:
        """Position table [1, 1 + N, C] for images of `height` x `width` pixels.

        Bicubic without antialiasing. The sampling grid follows the scale factor (n + 0.1) / grid
        rather than the true ratio, as published: the 0.1 once guarded against rounding, and
        the released weights are trained with it.
        """
        table = self.pos_embed[:, 1:]  # [1, G * G, C]
        rows, columns = height // self.patch_size, width // self.patch_size
        if rows * columns == table.shape[1] and height == width:
            return self.pos_embed
        grid = math.isqrt(table.shape[1])
        patches = F.interpolate(
            table.unflatten(1, (grid, grid)).permute(0, 3, 1, 2),
            scale_factor=((rows + 0.1) / grid, (columns + 0.1) / grid),
            mode="bicubic",
        )
        return torch.cat([self.pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

    def embed(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """What enters the first block: images [B, in_chans, H, W] -> [B, 1 + N, C].

        True in `masks` [B, h, w] puts `masked_embed` in the place of the patch, before positions
        are added (iBOT, section 3.1). Raises ValueError for masks of another shape or dtype, or a
        backbone built without masking.
        """
        patches = self.patch_embed(x)  # [B, C, h, w]
        if masks is not None:
            patches = self._mask(patches, masks)
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)
        tokens = torch.cat([cls_token, patches.flatten(2).transpose(1, 2)], dim=1)
        return tokens + self.position_embedding(x.shape[2], x.shape[3])

    def _mask(self, patches: Tensor, masks: Tensor) -> Tensor:
        if self.masked_embed is None:
            raise ValueError("masks for a backbone without masked_embed: only a student has it")
        expected = [patches.shape[0], *patches.shape[2:]]
        if list(masks.shape) != expected or masks.dtype != torch.bool:
            raise ValueError(
                f"masks are {masks.dtype} {list(masks.shape)}: expected bool {expected},"
                " one value a patch"
            )
        masked_embed = self.masked_embed.to(patches.dtype)[:, :, None, None]  # [1, C, 1, 1]
        return torch.where(masks.unsqueeze(1), masked_embed, patches)

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images [B, in_chans, H, W], masks bool [B, h, w] or None -> tokens [B, 1 + N, C]."""
        x = self.embed(x, masks)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.fc_norm is None:
            return x
        pooled = self.fc_norm(x[:, 1:].mean(dim=1, keepdim=True))
        return torch.cat([pooled, x[:, 1:]], dim=1)

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Outputs of the last `n` blocks, each [B, 1 + N, C] after the final norm; all blocks where
        `n` is above the depth. Raises ValueError for n below 1."""
        if n < 1:
            raise ValueError(f"n = {n} blocks asked for: expected at least 1")
        x = self.embed(x)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - n:
                outputs.append(self.norm(x))
        return outputs

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Attention weights of the last block, [B, H, 1 + N, 1 + N], rows are queries."""
        x = self.embed(x)
        for block in self.blocks[:-1]:
            x = block(x)
        last = cast(Block, self.blocks[-1])
        return last.attn.attention_map(last.norm1(x))
