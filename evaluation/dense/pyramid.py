"""Feature maps of strides 4, 8, 16 and 32 from a backbone, shared by the dense tasks."""

from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from ibeton.model.backbones.vit import VisionTransformer

STRIDES = (4, 8, 16, 32)


class Pyramid(nn.Module):
    """Images [B, 3, H, W] -> four maps [B, C, H / stride, W / stride]; H and W multiples of 32.

    A ViT gives patch tokens of four blocks, after its final norm if `norm`, resized if `resized`;
    Swin the outputs of its stages. `frozen` trains nothing of the backbone. Raises ValueError for a
    patch size that gives no such strides.
    """

    def __init__(
        self, backbone: nn.Module, norm: bool = True, resized: bool = True, frozen: bool = False
    ) -> None:
        super().__init__()
        self.backbone, self.norm, self.frozen = backbone, norm, frozen
        if isinstance(backbone, VisionTransformer):
            depth, width, patch = len(backbone.blocks), backbone.embed_dim, backbone.patch_size
            ends = (depth // 3, depth // 2, 2 * depth // 3, depth)  # published for 12 and 24
            self.taken: list[Any] = [backbone.blocks[max(0, end - 1)] for end in ends]
            self.channels = [width] * 4  # of the maps
            strides = STRIDES if resized else (patch,) * 4
            self.levels = nn.ModuleList(_resize(width, patch, stride) for stride in strides)
            backbone.norm.requires_grad_(norm)
        else:  # Swin, whose final norm fits the last stage; the others get one each
            self.taken = [stage.blocks[-1] for stage in cast(Any, backbone).layers]
            self.channels = [cast(Any, backbone).embed_dim // 2**i for i in (3, 2, 1, 0)]
            self.levels = nn.ModuleList(nn.LayerNorm(width) for width in self.channels[:3])
        if frozen:
            backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> "Pyramid":
        super().train(mode)
        self.backbone.train(mode and not self.frozen)
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        vit: Any = self.backbone
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = outputs_of(self.taken, vit, x)
        if not isinstance(vit, VisionTransformer):  # [B, h, w, C]
            norms: list[Any] = [*self.levels, vit.norm]
            return [norm(m).permute(0, 3, 1, 2) for norm, m in zip(norms, maps, strict=True)]
        grid = [side // vit.patch_size for side in x.shape[2:]]
        maps = [m.unflatten(0, (len(x), -1))[:, 1:] for m in maps]  # patch tokens [B, N, C]
        maps = [(vit.norm(m) if self.norm else m).mT.unflatten(2, grid) for m in maps]
        return [level(m) for level, m in zip(self.levels, maps, strict=True)]


def outputs_of(modules: list[nn.Module], network: nn.Module, x: Tensor) -> list[Tensor]:
    """What modules inside a network return when it is called."""
    found: dict[nn.Module, Tensor] = {}
    with ExitStack() as stack:
        for m in {*modules}:
            stack.callback(m.register_forward_hook(lambda m, _, y: found.update({m: y})).remove)
        network(x)
    return [found[module] for module in modules]


def _resize(width: int, patch: int, stride: int) -> nn.Module:
    """From a map of stride `patch` to one of `stride`, as published for patches of 8 and 16."""
    if patch == 4 * stride:
        up = [nn.ConvTranspose2d(width, width, 2, 2) for _ in range(2)]
        return nn.Sequential(up[0], nn.BatchNorm2d(width), nn.GELU(), up[1])
    if patch == 2 * stride:
        return nn.ConvTranspose2d(width, width, 2, 2)
    if stride % patch:
        raise ValueError(f"patches of {patch} pixels give no map of stride {stride}: use 4, 8, 16")
    return nn.MaxPool2d(stride // patch) if stride > patch else nn.Identity()
