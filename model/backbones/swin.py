"""The Swin transformer as iBOT trains it: timm's parts in the published assembly.

timm's own model has other parameter names (patch merging opens a stage; index tables are not
saved). Its outputs differ where windows do not tile a map, as at 96 pixels: timm shifts before it
pads, the published code after it.

In shapes: B images, C channels, h x w map of a stage, W windows of T tokens, H attention heads.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed
from timm.models.swin_transformer import (
    PatchMerging,
    WindowAttention,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ibeton.model.backbones.blocks import LayerNorm, check_masks, init_linear
from ibeton.model.config import SWINS, ModelConfig

DEPTHS, NUM_HEADS = (2, 2, 6, 2), (3, 6, 12, 24)  # Swin-T's, by stage
EMBED_PATCH = 4  # side in pixels of what one token of the first stage sees
MASKED_OUT = -100.0  # added to attention scores (published code)


class Attention(WindowAttention):
    """timm's attention within windows [B * W, T, C] -> same, its index table in the state dict."""

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__(dim, num_heads, window_size=window)
        self.register_buffer("relative_position_index", self.relative_position_index)

    def attention_map(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax weights [B * W, H, T, T], rows are queries; mask [W, T, T] or None."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        scores = qkv[0] * self.scale @ qkv[1].transpose(-2, -1)
        scores = scores + bias.T.unflatten(1, scores.shape[-2:])
        if mask is not None:
            scores = scores + mask.repeat(len(x) // len(mask), 1, 1).unsqueeze(1)
        return scores.softmax(dim=-1)


class Block(nn.Module):
    """Pre-norm block on maps [B, h, w, C]; `shift` moves the windows by that many tokens.

    Maps that windows do not tile are padded with zeros on the right and below, after the norm;
    these take part in attention, through the biases of query, key and value (published code).
    """

    def __init__(self, dim: int, num_heads: int, window: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.window = window
        self.shift = shift
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads, window)
        self.drop_path = DropPath(drop_path)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`mask` is what `attention_mask` gives for a block that shifts, None for the others."""
        height, width = x.shape[1:3]
        out = self.attn(self.windows(x), mask).unflatten(1, (self.window, self.window))
        full = (_padded(height, self.window), _padded(width, self.window))
        out = window_reverse(out, (self.window, self.window), *full)
        if self.shift:
            out = out.roll((self.shift, self.shift), (1, 2))
        x = x + self.drop_path(out[:, :height, :width])
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def windows(self, x: Tensor) -> Tensor:
        """The windows of a map [B, h, w, C] after the norm: [B * W, T, C]."""
        height, width = x.shape[1:3]
        below, right = _padded(height, self.window) - height, _padded(width, self.window) - width
        x = F.pad(self.norm1(x), (0, 0, 0, right, 0, below))
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        return window_partition(x, (self.window, self.window)).flatten(1, 2)


def _padded(side: int, window: int) -> int:
    """`side` rounded up to whole windows."""
    return -(-side // window) * window


def attention_mask(x: Tensor, window: int, shift: int) -> Tensor:
    """What is added to the attention scores of a shifted map x [B, h, w, C]: [W, T, T], dtype of x.

    The roll moves the first rows (columns) of the map behind its last ones. Tokens of a window
    attend to each other only if they lie on the same side of that border.
    """
    sides = [_padded(side, window) for side in x.shape[1:3]]
    rows, columns = (torch.arange(s, device=x.device) >= s - shift for s in sides)
    regions = 2 * rows[:, None] + columns  # [h, w], 0 .. 3
    regions = window_partition(regions[None, :, :, None], (window, window)).flatten(1)  # [W, T]
    apart = regions[:, :, None] != regions[:, None, :]
    return torch.zeros_like(apart, dtype=x.dtype).masked_fill(apart, MASKED_OUT)


class Downsample(PatchMerging):
    """timm's merging of 2 x 2 tokens [B, h, w, C] -> [B, ceil(h / 2), ceil(w / 2), 2 C], its parts
    in the published order of the state dict."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, norm_layer=LayerNorm)  # type: ignore[arg-type]
        del self.norm
        self.norm = LayerNorm(4 * dim)


# What a block computed: the block, its input map, attention mask, output map.
Step = tuple[Block, Tensor, Tensor | None, Tensor]


class Stage(nn.Module):
    """Blocks of one width, every other one shifted by half a window, then down-sampling, except in
    the last stage. There is a block for each rate of `drop_path`.

    A map whose side (at the image size that the network is built for) is not above `window` is
    one window, and nothing shifts. At other image sizes windows and shifts stay as built.
    """

    def __init__(
        self, dim: int, heads: int, window: int, side: int, drop_path: list[float], last: bool
    ) -> None:
        super().__init__()
        self.checkpoint_blocks = False
        self.window = min(window, side)
        self.shift = window // 2 if side > window else 0
        self.blocks = nn.ModuleList(
            Block(dim, heads, self.window, self.shift * (i % 2), rate)
            for i, rate in enumerate(drop_path)
        )
        self.downsample = None if last else Downsample(dim)

    def forward(self, x: Tensor, trace: list[Step] | None = None) -> Tensor:
        """[B, h, w, C] -> [B, h / 2, w / 2, 2 C], or the same size in the last stage. A `trace`
        receives a `Step` for every block."""
        mask = attention_mask(x, self.window, self.shift) if self.shift else None
        for block in cast(list[Block], self.blocks):
            before, block_mask = x, mask if block.shift else None
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, block_mask, use_reentrant=False)
            else:
                x = block(x, block_mask)
            if trace is not None:
                trace.append((block, before, block_mask, x))
        return x if self.downsample is None else self.downsample(x)


class SwinTransformer(nn.Module):
    """Swin as iBOT trains it, Swin-T by default. State-dict names are the published ones.

    `patch_size` of the result is the side in pixels of one output token, 32, which is also one cell
    of a mask; `embed_dim` is the width of output tokens. The first stage has an eighth of it, and
    each stage doubles it. Windows are made for images of `config.image_size` (see `Stage`); other
    sizes, oblong ones too, are padded. With `config.checkpoint_blocks` only the input of each block
    is kept, and the backward computes the block again. Only a student has `masked_embed` and
    stochastic depth. Raises ValueError for widths that the attention heads do not divide.
    """

    def __init__(
        self,
        config: ModelConfig,
        is_student: bool,
        depths: Sequence[int] = DEPTHS,  # blocks of each of the four stages
        num_heads: Sequence[int] = NUM_HEADS,
    ) -> None:
        super().__init__()
        stages = len(DEPTHS)
        self.mask_cell = 2 ** (stages - 1)  # side of a mask's cell in tokens of the first stage
        self.patch_size = EMBED_PATCH * self.mask_cell
        self.embed_dim = config.width()
        widths = [self.embed_dim // 2**i for i in reversed(range(stages))]
        if any(w % heads for w, heads in zip(widths, num_heads, strict=True)):
            raise ValueError(f"stage widths {widths} are not multiples of heads {num_heads}")
        self.masked_embed: nn.Parameter | None = None
        if is_student:
            self.masked_embed = nn.Parameter(torch.zeros(1, widths[0]))
        self.patch_embed = PatchEmbed(
            None, EMBED_PATCH, 3, widths[0], norm_layer=LayerNorm, output_fmt="NHWC"
        )
        drop_path = config.drop_path if is_student else 0.0
        # Stochastic depth grows linearly over all blocks, from 0 in the first.
        rates = [drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        self.layers = nn.ModuleList(
            Stage(
                widths[i],
                num_heads[i],
                SWINS[config.arch],
                config.image_size // EMBED_PATCH // 2**i,
                rates[sum(depths[:i]) : sum(depths[: i + 1])],
                last=i == stages - 1,
            )
            for i in range(stages)
        )
        for stage in cast(list[Stage], self.layers):
            stage.checkpoint_blocks = config.checkpoint_blocks
        self.norm = LayerNorm(self.embed_dim)
        self.apply(init_linear)

    def embed(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """What enters the first block: images [B, in_chans, H, W] -> [B, H / 4, W / 4, C].

        True in `masks` [B, H / 32, W / 32] replaces the 8 x 8 normed embeddings of that cell
        by `masked_embed`. Raises ValueError for images and masks of another shape or dtype,
        or a backbone built without masking.
        """
        channels = self.patch_embed.proj.in_channels
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"images of shape {list(x.shape)}: expected [B, {channels}, H, W]")
        height, width = x.shape[2:]
        cell = EMBED_PATCH if masks is None else self.patch_size
        if height % cell or width % cell:
            kind = "patches" if masks is None else "cells of a mask"
            raise ValueError(
                f"images of {height} x {width} pixels are not a whole number of {cell} pixel {kind}"
            )
        tokens = self.patch_embed(x)
        return tokens if masks is None else self._mask(tokens, masks)

    def _mask(self, tokens: Tensor, masks: Tensor) -> Tensor:
        expected = [len(tokens), *(side // self.mask_cell for side in tokens.shape[1:3])]
        cell = f"cell of {self.patch_size} x {self.patch_size} pixels"
        token = check_masks(masks, expected, cell, self.masked_embed).to(tokens.dtype)
        masked = masks.repeat_interleave(self.mask_cell, 1).repeat_interleave(self.mask_cell, 2)
        return torch.where(masked.unsqueeze(-1), token, tokens)

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images [B, in_chans, H, W], masks bool [B, H / 32, W / 32] or None -> [B, 1 + N, C].

        There is no class token: the class output is the mean of all final tokens, masked ones too
        (published code).
        """
        x = self.embed(x, masks)
        for stage in self.layers:
            x = stage(x)
        return with_mean(self.norm(x))

    def trace(self, x: Tensor) -> list[Step]:
        """The steps of all blocks for images [B, in_chans, H, W]."""
        steps: list[Step] = []
        x = self.embed(x)
        for stage in self.layers:
            x = stage(x, steps)
        return steps

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Outputs of the last `n` blocks, each [B, 1 + N, C] of its own stage, the mean first; all
        blocks where `n` is above their number. The final norm is applied to those of the last
        stage, whose width it has. Raises ValueError for n below 1."""
        if n < 1:
            raise ValueError(f"n = {n} blocks: expected at least 1")
        outputs = [after for *_, after in self.trace(x)[-n:]]
        return [with_mean(self.norm(o) if o.shape[-1] == self.embed_dim else o) for o in outputs]

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Attention weights of the last block, [B * W, H, T, T], rows are queries; the windows of
        an image follow each other, row by row."""
        block, before, mask, _ = self.trace(x)[-1]
        return block.attn.attention_map(block.windows(before), mask)


def with_mean(tokens: Tensor) -> Tensor:
    """A map [B, h, w, C] -> its mean and its tokens, [B, 1 + h * w, C]."""
    tokens = tokens.flatten(1, 2)
    return torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
