"""Feature maps of strides 4, 8, 16 and 32 from a backbone, shared by the dense tasks.

A plain ViT gives the patch tokens of four blocks, resized; Swin gives the outputs of its stages.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ibeton.model.backbones.blocks import Kept, draw_kept
from ibeton.model.backbones.vit import VisionTransformer

STRIDES = (4, 8, 16, 32)


class Pyramid(nn.Module):
    """Images [B, 3, H, W] -> four maps [B, C, H / stride, W / stride]; H and W multiples of 32.

    `norm` applies a ViT's final norm to each map; `resized=False` leaves its maps at the patch's
    stride; `frozen` trains nothing of the backbone. `channels` are the maps'. Raises ValueError
    for a patch size that does not lead to these strides.
    """

    def __init__(
        self, backbone: nn.Module, norm: bool = True, resized: bool = True, frozen: bool = False
    ) -> None:
        super().__init__()
        self.backbone, self.norm, self.frozen = backbone, norm, frozen
        if isinstance(backbone, VisionTransformer):
            depth, width, patch = len(backbone.blocks), backbone.embed_dim, backbone.patch_size
            # Blocks 3, 5, 7 and 11 of 12, 7, 11, 15 and 23 of 24 (published configurations).
            self.taken = [max(0, n - 1) for n in (depth // 3, depth // 2, 2 * depth // 3, depth)]
            self.channels = [width] * 4
            self.levels = nn.ModuleList(
                _resize(width, patch, stride) if resized else nn.Identity() for stride in STRIDES
            )
            backbone.norm.requires_grad_(norm)
        else:  # Swin, whose final norm fits the last stage; the others get one each
            self.channels = [cast(Any, backbone).embed_dim // 2**i for i in (3, 2, 1, 0)]
            self.levels = nn.ModuleList(nn.LayerNorm(width) for width in self.channels[:3])
        if frozen:
            backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> "Pyramid":
        super().train(mode)
        self.backbone.train(mode and not self.frozen)
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        vit = isinstance(self.backbone, VisionTransformer)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self._vit(x) if vit else self._swin(x)
        if vit:
            return [level(m) for level, m in zip(self.levels, maps, strict=True)]
        norms: list[Any] = [*self.levels, self.backbone.norm]
        return [norm(m).permute(0, 3, 1, 2) for norm, m in zip(norms, maps, strict=True)]

    def _vit(self, x: Tensor) -> list[Tensor]:
        vit = cast(VisionTransformer, self.backbone)
        tokens, grid = vit.embed(x), [side // vit.patch_size for side in x.shape[2:]]
        shapes, packed = [(tokens.shape[0], tokens.shape[1])], tokens.flatten(0, 1)
        kept: list[Kept | None] = [None] * (2 * len(vit.blocks))
        if vit.training and any(vit.drop_path_rates):
            kept = draw_kept([r for r in vit.drop_path_rates for _ in range(2)], shapes, x.device)
        outputs = []
        for i, block in enumerate(vit.blocks):
            arguments = (packed, shapes, kept[2 * i], kept[2 * i + 1], None)
            again = vit.checkpoint_blocks and torch.is_grad_enabled()
            packed = (
                checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments)
            )
            outputs.append(packed)
        maps = [outputs[i].view_as(tokens)[:, 1:] for i in self.taken]
        maps = [vit.norm(m) if self.norm else m for m in maps]
        return [m.transpose(1, 2).unflatten(2, grid) for m in maps]  # [B, C, h, w]

    def _swin(self, x: Tensor) -> list[Tensor]:  # of each stage, [B, h, w, C]
        swin, steps = cast(Any, self.backbone), cast(Any, self.backbone).trace(x)
        ends = [sum(len(stage.blocks) for stage in swin.layers[: i + 1]) - 1 for i in range(4)]
        return [steps[end][-1] for end in ends]


def _resize(width: int, patch: int, stride: int) -> nn.Module:
    """From a map of stride `patch` to one of `stride`, as published for patches of 8 and 16."""
    if patch == 4 * stride:
        up = [nn.ConvTranspose2d(width, width, 2, 2) for _ in range(2)]
        return nn.Sequential(up[0], nn.BatchNorm2d(width), nn.GELU(), up[1])
    if patch == 2 * stride:
        return nn.ConvTranspose2d(width, width, 2, 2)
    if stride % patch:
        raise ValueError(
            f"patches of {patch} pixels give no map of stride {stride}: use 4, 8 or 16"
        )
    return nn.MaxPool2d(stride // patch) if stride > patch else nn.Identity()
