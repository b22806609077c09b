"""The vision transformer, under timm's parameter names.

In shapes: B images, N patch tokens, C channels, H attention heads. Images of several sizes go
through the blocks together, packed as `model.backbones.blocks` says.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ibeton.model.backbones.blocks import (
    INIT_STD,
    LAYERNORM_EPS,
    Block,
    Kept,
    Shapes,
    among,
    draw_kept,
    init_linear,
)


class PatchEmbed(nn.Module):
    """Images [B, in_chans, h*P, w*P] -> one embedding a patch, [B, h*w, C]."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution, but by one matrix product: patches do not overlap. Raises ValueError
        for a shape that the patches do not tile."""
        if x.dim() != 4 or x.shape[1] != self.proj.in_channels:
            raise ValueError(
                f"images of shape {list(x.shape)}: expected [B, {self.proj.in_channels}, H, W]"
            )
        side, (height, width) = self.patch_size, x.shape[2:]
        if height % side or width % side:
            raise ValueError(
                f"images of {height} x {width} pixels are not a whole number of {side}"
                f" pixel patches: crop to a multiple of --patch-size or change it"
            )
        patches = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, in_chans, h, P, w, P]
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """ViT as iBOT trains it. State-dict names are timm's, plus `masked_embed` of the student.

    `image_size` is what the position table is made for; other sizes, oblong ones too, interpolate
    it. With `mean_pool` the class output is norm(mean of patch tokens), and patch tokens leave
    without a final norm. `checkpoint_blocks` keeps only what enters each block and computes the
    block again in the backward. Raises ValueError for sizes that do not divide.
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
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image size {image_size} is no multiple of patch size {patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"width {embed_dim} is not a multiple of {num_heads} attention heads")
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.checkpoint_blocks = checkpoint_blocks
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        grid = image_size // patch_size
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, embed_dim))
        self.masked_embed: nn.Parameter | None = None
        if masked_im_modeling:
            self.masked_embed = nn.Parameter(torch.zeros(1, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        # Stochastic depth grows linearly, from 0 in the first block.
        self.drop_path_rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, layer_scale) for _ in range(depth)
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
        patches = self.patch_embed(x)  # [B, N, C]
        if masks is not None:
            patches = self._mask(patches, masks, x.shape[2:])
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)
        tokens = torch.cat([cls_token, patches], dim=1)
        return tokens + self.position_embedding(x.shape[2], x.shape[3])

    def _mask(self, patches: Tensor, masks: Tensor, size: torch.Size) -> Tensor:
        if self.masked_embed is None:
            raise ValueError("masks for a backbone without masked_embed: only a student has it")
        expected = [len(patches), *(pixels // self.patch_size for pixels in size)]
        if list(masks.shape) != expected or masks.dtype != torch.bool:
            raise ValueError(
                f"masks are {masks.dtype} {list(masks.shape)}: expected bool {expected},"
                " one value a patch"
            )
        return torch.where(
            masks.flatten(1).unsqueeze(2), self.masked_embed.to(patches.dtype), patches
        )

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images [B, in_chans, H, W], masks bool [B, h, w] or None -> tokens [B, 1 + N, C]."""
        cls, patches = self.forward_views([x], [masks], [None])[0]
        return torch.cat([cls.unsqueeze(1), patches], dim=1)

    def forward_views(
        self,
        views: list[Tensor],  # images [B, in_chans, H, W] of each crop size
        masks: list[Tensor | None],  # bool [B, h, w] of each
        wanted: list[Tensor | None],  # int64 [M], places among its B * N patches; None: all
    ) -> list[tuple[Tensor, Tensor]]:
        """Class tokens [B, C] and wanted patch tokens [M, C] ([B, N, C] for all) of each crop
        size. See `model.network` for who calls this."""
        embedded = [self.embed(x, mask) for x, mask in zip(views, masks, strict=True)]
        shapes = [(t.shape[0], t.shape[1]) for t in embedded]
        x = _pack(embedded)
        if self.fc_norm is None and any(places is not None for places in wanted):
            return self._wanted(x, shapes, wanted)
        parts = self._blocks(x, shapes).split([images * tokens for images, tokens in shapes])
        return [
            self._class_and_patches(part.view(images, tokens, -1), places)
            for part, (images, tokens), places in zip(parts, shapes, wanted, strict=True)
        ]

    def _wanted(
        self, x: Tensor, shapes: Shapes, wanted: list[Tensor | None]
    ) -> list[tuple[Tensor, Tensor]]:
        """As `forward_views`, from packed tokens: the others end before the last block's MLP."""
        rows = wanted_rows(shapes, wanted, x.device)
        outputs = self.norm(self._blocks(x, shapes, torch.cat(rows))).split([len(r) for r in rows])
        patches = [
            out if places is not None else out.unflatten(0, (images, -1))
            for out, places, (images, _) in zip(outputs[1::2], wanted, shapes, strict=True)
        ]
        return list(zip(outputs[::2], patches, strict=True))

    def _blocks(self, x: Tensor, shapes: Shapes, rows: Tensor | None = None) -> Tensor:
        """Packed tokens [T, C] through all blocks; with `rows`, only these leave the last."""
        kept: list[Kept | None] = [None] * (2 * len(self.blocks))
        if self.training and any(self.drop_path_rates):
            rates = [rate for rate in self.drop_path_rates for _ in range(2)]
            kept = draw_kept(rates, shapes, x.device)
            if rows is not None:
                kept[-1] = kept[-1] and among(kept[-1], rows, len(x))
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            arguments = (x, shapes, kept[2 * i], kept[2 * i + 1], rows if last else None)
            if self.checkpoint_blocks and torch.is_grad_enabled():
                # Everything random was drawn above, so there is no random state to keep.
                x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*arguments)
        return x

    def _class_and_patches(self, x: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, 1 + N, C] after the last block -> class tokens and wanted patches, normed."""
        if self.fc_norm is None:
            x = self.norm(x)
            return x[:, 0], x[:, 1:]
        patches = x[:, 1:]
        cls = self.fc_norm(patches.mean(dim=1))
        return cls, patches if places is None else patches.flatten(0, 1).index_select(0, places)

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Outputs of the last `n` blocks, each [B, 1 + N, C] after the final norm; all blocks where
        `n` is above the depth. Raises ValueError for n below 1."""
        if n < 1:
            raise ValueError(f"n = {n} blocks asked for: expected at least 1")
        x = self.embed(x)
        shapes = [(x.shape[0], x.shape[1])]
        outputs, packed = [], x.flatten(0, 1)
        for i, block in enumerate(self.blocks):
            packed = block(packed, shapes)
            if i >= len(self.blocks) - n:
                outputs.append(self.norm(packed).view_as(x))
        return outputs

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Attention weights of the last block, [B, H, 1 + N, 1 + N], rows are queries."""
        x = self.embed(x)
        images, tokens, _ = x.shape
        packed = x.flatten(0, 1)
        for block in self.blocks[:-1]:
            packed = block(packed, [(images, tokens)])
        last = cast(Block, self.blocks[-1])
        qkv = last.attn.qkv(last.norm1(packed))
        query, key, _ = last.attn.split_heads(qkv, images, tokens)
        return (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1)


def _pack(embedded: list[Tensor]) -> Tensor:
    """Tokens [B, 1 + N, C] of each crop size -> [T, C]."""
    packed = [tokens.flatten(0, 1) for tokens in embedded]
    return packed[0] if len(packed) == 1 else torch.cat(packed)


def wanted_rows(shapes: Shapes, wanted: list[Tensor | None], device: torch.device) -> list[Tensor]:
    """Where the class tokens [B] and wanted patches [M] of each crop size stand among the packed
    tokens: two tensors for each crop size."""
    rows, start = [], 0
    for (images, tokens), places in zip(shapes, wanted, strict=True):
        if places is None:
            places = torch.arange(images * (tokens - 1), device=device)
        rows.append(start + tokens * torch.arange(images, device=device))
        rows.append(
            start + places + places // (tokens - 1) + 1
        )  # a class token before each image's
        start += images * tokens
    return rows
