"""The vision transformer, under timm's parameter names.

In shapes: B images, N patch tokens, C channels, H attention heads. Images of several sizes go
through the blocks together, packed as `model.backbones.blocks` says.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ibeton.model.backbones.blocks import (
    INIT_STD,
    Block,
    Kept,
    LayerNorm,
    Shapes,
    among,
    check_masks,
    draw_kept,
    init_linear,
)
from ibeton.model.config import ModelConfig
from ibeton.model.fused.block import fused_block
from ibeton.model.fused.embed import fused_embed
from ibeton.model.kernels.half_weights import product_dtype
from ibeton.model.kernels.launch import kernels_run_on
from ibeton.model.kernels.packed_attention import Attended
from ibeton.model.kernels.residual_norm import Branch, residual_norm

# Activations up to this share of a GPU's memory are kept whole where `recompute` is "auto"
FITS = 0.6


class PatchEmbed(nn.Module):
    """Images [B, in_chans, h*P, w*P] -> one embedding per patch, [B, h*w, C]."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution, but by one matrix product: patches do not overlap. Raises ValueError
        as `split`."""
        return F.linear(
            self.split(x).flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias
        )

    def split(self, x: Tensor) -> Tensor:
        """The patches [B, h, w, in_chans, P, P] of images, a view. Raises ValueError for a shape
        that patches do not tile."""
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
        return patches.permute(0, 2, 4, 1, 3, 5)


class VisionTransformer(nn.Module):
    """ViT as iBOT trains it. State-dict names are timm's, plus `masked_embed` of the student.

    Only a student has `masked_embed` and stochastic depth. The position table fits images of
    `config.image_size`; for other sizes, oblong ones too, it is interpolated. With
    `config.mean_pool` the class output is norm(mean of patch tokens), and patch tokens get no final
    norm. With `config.checkpoint_blocks` only the input of each block is kept, and the backward
    computes the block again.
    """

    def __init__(self, config: ModelConfig, is_student: bool) -> None:
        super().__init__()
        embed_dim, depth, _ = config.backbone_shape()
        self.embed_dim = embed_dim
        self.patch_size = config.patch_size
        self.checkpoint_blocks = config.checkpoint_blocks
        self.recompute = config.recompute
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        grid = config.image_size // config.patch_size
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, embed_dim))
        self.masked_embed: nn.Parameter | None = None
        if is_student:
            self.masked_embed = nn.Parameter(torch.zeros(1, embed_dim))
        self.patch_embed = PatchEmbed(config.patch_size, 3, embed_dim)
        # Stochastic depth grows linearly, from 0 in the first block.
        drop_path = config.drop_path if is_student else 0.0
        self.drop_path_rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(config) for _ in range(depth))
        norm = LayerNorm(embed_dim)
        self.norm = nn.Identity() if config.mean_pool else norm
        self.fc_norm = norm if config.mean_pool else None
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

        True in `masks` [B, h, w] replaces the patch by `masked_embed`, before positions are added
        (iBOT, section 3.1). Raises ValueError for masks of another shape or dtype, or a
        backbone built without masking.
        """
        patches = self.patch_embed(x)  # [B, N, C]
        if masks is not None:
            token = self._check_masks(masks, x).to(patches.dtype)
            patches = torch.where(masks.flatten(1).unsqueeze(2), token, patches)
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)
        tokens = torch.cat([cls_token, patches], dim=1)
        return tokens + self.position_embedding(x.shape[2], x.shape[3])

    def _check_masks(self, masks: Tensor, images: Tensor) -> Tensor:
        expected = [len(images), *(pixels // self.patch_size for pixels in images.shape[2:])]
        return check_masks(masks, expected, "patch", self.masked_embed)

    def _embed_views(
        self, views: list[Tensor], masks: list[Tensor | None]
    ) -> tuple[Tensor, Shapes]:
        """`embed` of each crop size -> packed tokens [T, C] and their shapes."""
        plain = not kernels_run_on(views[0]) or _hooked(self.patch_embed)
        if plain or any(x.requires_grad for x in views):
            embedded = [self.embed(x, mask) for x, mask in zip(views, masks, strict=True)]
            packed = [tokens.flatten(0, 1) for tokens in embedded]
            shapes = [(t.shape[0], t.shape[1]) for t in embedded]
            return packed[0] if len(packed) == 1 else torch.cat(packed), shapes
        for x, mask in zip(views, masks, strict=True):
            if mask is not None:
                self._check_masks(mask, x)
        return fused_embed(
            [self.patch_embed.split(x) for x in views],
            masks,
            [self.position_embedding(*x.shape[2:]) for x in views],
            self.patch_embed.proj.weight,
            cast(Tensor, self.patch_embed.proj.bias),
            self.cls_token,
            self.masked_embed,
        )

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images [B, in_chans, H, W], masks bool [B, h, w] or None -> tokens [B, 1 + N, C]."""
        return self.forward_views([x], [masks])[0]

    def tokens_for_product(self, x: Tensor) -> Tensor:
        """`forward`, in float32 or in the dtype of matrix products."""
        return self.forward_views([x], [None], for_product=True)[0]

    def forward_views(
        self, views: list[Tensor], masks: list[Tensor | None], for_product: bool = False
    ) -> list[Tensor]:
        """`forward` of the images and masks of each crop size, in one pass."""
        x, shapes = self._embed_views(views, masks)
        x = self._normed(x, shapes, for_product=for_product)
        parts = x.split([images * tokens for images, tokens in shapes])
        sizes = [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]
        if self.fc_norm is None:
            return sizes
        means = [self.fc_norm(tokens[:, 1:].mean(dim=1, keepdim=True)) for tokens in sizes]
        return [torch.cat([m, t[:, 1:]], dim=1) for m, t in zip(means, sizes, strict=True)]

    def selected(self, views: list[Tensor], masks: list[Tensor | None], index: Tensor) -> Tensor:
        """Of `forward_views` only the class tokens of all crop sizes and then the patches of the
        first in `index`, int64 [M] among its B * N patches: [R, C], in float32 or in the dtype of
        matrix products."""
        if self.fc_norm is None:
            x, shapes = self._embed_views(views, masks)
            return self._normed(x, shapes, selected_rows(shapes, index), for_product=True)
        sizes = self.forward_views(views, masks)
        patches = sizes[0][:, 1:].flatten(0, 1).index_select(0, index)
        return torch.cat([*(tokens[:, 0] for tokens in sizes), patches])

    def _normed(
        self, x: Tensor, shapes: Shapes, rows: Tensor | None = None, for_product: bool = False
    ) -> Tensor:
        """Packed tokens [T, C] after all blocks and `norm`; with `rows`, only these tokens. Kernels
        return float32, or with `for_product` the dtype of matrix products."""
        if not kernels_run_on(x) or _hooked(self.blocks):
            return self.norm(self._blocks(x, shapes, rows))
        x, branch = self._fused_blocks(x, shapes, rows)
        if isinstance(self.norm, nn.Identity):
            return x + branch.value()
        norm, dtype = self.norm, product_dtype(x) if for_product else x.dtype
        return residual_norm(x, branch, norm.weight, norm.bias, norm.eps, dtype)[1]

    def _fused_blocks(
        self, x: Tensor, shapes: Shapes, rows: Tensor | None
    ) -> tuple[Tensor, Branch]:
        """`_blocks` by the Triton kernels; the last MLP's output is not added yet."""
        kept = self._draw_kept(x, shapes, rows, fused=True)
        recompute, branch = self._recomputes(x), Branch()
        for i, block in enumerate(self.blocks):
            last = rows if i == len(self.blocks) - 1 else None
            for_backward: list[Attended] = []
            arguments = (block, x, branch, shapes, *kept[2 * i : 2 * i + 2], last, recompute)
            x, branch = self._run(fused_block, *arguments, for_backward)
            if self.checkpoint_blocks:
                for_backward.clear()
        return x, branch

    def _recomputes(self, x: Tensor) -> bool:
        """Whether norms and GELUs of packed tokens x [T, C] are computed again in the backward."""
        if self.recompute != "auto" or not x.is_cuda:
            return self.recompute == "on"
        block = cast(Block, self.blocks[0])
        kept = 4 * x.numel() * len(self.blocks) * (5 + block.mlp.fc1.out_features / self.embed_dim)
        memory = torch.cuda.get_device_properties(x.device).total_memory
        return kept > FITS * memory

    def _draw_kept(
        self, x: Tensor, shapes: Shapes, rows: Tensor | None, fused: bool = False
    ) -> list[Kept | None]:
        """What stochastic depth keeps of packed tokens [T, C], for the two branches per block; for
        the last among `rows`."""
        if not (self.training and any(self.drop_path_rates)):
            return [None] * (2 * len(self.blocks))
        rates = [rate for rate in self.drop_path_rates for _ in range(2)]
        kept = draw_kept(rates, shapes, x.device, fused)
        if rows is not None and (last := kept[-1]) is not None:
            kept[-1] = among(last, rows, len(x))
        return kept

    def _blocks(self, x: Tensor, shapes: Shapes, rows: Tensor | None) -> Tensor:
        """Packed tokens [T, C] after all blocks; with `rows`, only these tokens."""
        kept = self._draw_kept(x, shapes, rows)
        for i, block in enumerate(self.blocks):
            last = rows if i == len(self.blocks) - 1 else None
            x = self._run(block, x, shapes, *kept[2 * i : 2 * i + 2], last)
        return x

    def _run(self, block: Callable[..., Any], *arguments: object) -> Any:
        if self.checkpoint_blocks and torch.is_grad_enabled():
            # Everything random was drawn before, so there is no random state to keep.
            return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        return block(*arguments)

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Outputs of the last `n` blocks, each [B, 1 + N, C] after the final norm; all blocks where
        `n` is above the depth. Raises ValueError for n below 1."""
        if n < 1:
            raise ValueError(f"n = {n} blocks: expected at least 1")
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


def _hooked(module: nn.Module) -> bool:
    """Whether a module inside has a hook, which the kernels would not call."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def selected_rows(shapes: Shapes, index: Tensor) -> Tensor:
    """Rows among the packed tokens: the class tokens of each crop size, then the patches of the
    first in `index`, int64 [M] among those of all its images."""
    rows, start = [], 0
    for images, tokens in shapes:
        end = start + images * tokens
        rows.append(torch.arange(start, end, tokens, device=index.device))
        start = end
    # One class token before the patches of each image
    return torch.cat([*rows, index + index // (shapes[0][1] - 1) + 1])
