"""Backbone and head as one network, the form of both student and teacher.

A backbone is called as `backbone(images [B, 3, H, W], masks bool [B, h, w] or None)` and returns
tokens [B, 1 + N, C], the class token first, for images of any size that its patches tile; N is
h * w, and only a student takes masks. It may offer `forward_views`, `selected` and
`tokens_for_product`, as `VisionTransformer` does, to take all crop sizes in one pass and to return
selected tokens only; without them each size has its own pass. `masked_embed` is the one parameter
that only the student has.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ibeton.model.head import IBOTHead

Logits = tuple[Tensor, Tensor, Tensor | None]  # class, patch, local class


class Targets(NamedTuple):
    """The teacher's output for a batch."""

    cls: Tensor  # logits [V * B, K]
    patch: Tensor  # logits [M, K2] of the masked patches
    patch_mean: Tensor  # [K2], mean of the logits of all patches, float32 at least


class Network(nn.Module):
    """Views of a batch -> logits over prototypes. State keys are `backbone.*` and `head.*`."""

    def __init__(self, backbone: nn.Module, head: IBOTHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(
        self,
        global_crops: Tensor,  # [V, B, 3, S, S]
        local_crops: Tensor | None = None,  # [L, B, 3, s, s]
        masks: Tensor | None = None,  # bool [V, B, h, w], True = masked; global views only
        patch_indices: Tensor | None = None,  # int64 [M], among the V * B * N patches
    ) -> Logits:
        """Class logits [V * B, K], patch logits [M, K2] of the patches in `patch_indices` (without
        it those of all, [V * B, N, K2]) and local class logits [L * B, K] (None without local
        views), view-major.

        One call takes all views, so that a wrapper such as DDP sees one forward per step. Local
        views are never masked (published code). Raises ValueError for crops or masks of other
        shapes.
        """
        _check(global_crops, masks)
        views = [global_crops.flatten(0, 1)]
        flat_masks = [None if masks is None else masks.flatten(0, 1)]
        if local_crops is not None and len(local_crops):
            views.append(local_crops.flatten(0, 1))
            flat_masks.append(None)
        if self.head.couples_tokens():  # statistics over every token of a crop size
            units = [self.head.bottleneck(tokens) for tokens in self._tokens(views, flat_masks)]
            cls, patch = torch.cat([size[:, 0] for size in units]), units[0][:, 1:]
            if patch_indices is not None:
                patch = patch.flatten(0, 1)[patch_indices]
        else:  # one pass of the head's MLP
            rows = self._rows(views, flat_masks, patch_indices)
            classes = sum(len(view) for view in views)
            cls, patch = self.head.bottleneck(rows).split([classes, len(rows) - classes])
            if patch_indices is None:
                patch = patch.unflatten(0, (len(views[0]), -1))
        logits, patch_logits = self.head.prototypes(cls, patch)
        images = len(views[0])
        return logits[:images], patch_logits, logits[images:] if len(views) > 1 else None

    def targets(self, global_crops: Tensor, patch_indices: Tensor) -> Targets:
        """The teacher's logits of class tokens and of the patches in `patch_indices`.

        The center needs the mean logits of all patches. The last layer is linear, so averaging
        before it gives the same mean from one row instead of V * B * N.
        """
        _check(global_crops, None)
        backbone = cast(Any, self.backbone)
        embed = getattr(backbone, "tokens_for_product", backbone)
        units, mean = self.head.bottleneck_and_mean(embed(global_crops.flatten(0, 1)))
        # One class token before the patches of each image
        rows = patch_indices + patch_indices // (units.shape[1] - 1) + 1
        patches = units.flatten(0, 1).index_select(0, rows)
        return Targets(*self.head.target_logits(units[:, 0], patches, mean))

    def _tokens(self, views: list[Tensor], masks: list[Tensor | None]) -> list[Tensor]:
        """The backbone's tokens of each crop size."""
        if hasattr(self.backbone, "forward_views"):
            return cast(Any, self.backbone).forward_views(views, masks)
        return [self.backbone(x, mask) for x, mask in zip(views, masks, strict=True)]

    def _rows(
        self, views: list[Tensor], masks: list[Tensor | None], patch_indices: Tensor | None
    ) -> Tensor:
        """The class tokens of all views and then the patches in `patch_indices` (all patches of the
        global views), [R, C]."""
        if patch_indices is not None and hasattr(self.backbone, "selected"):
            return cast(Any, self.backbone).selected(views, masks, patch_indices)
        sizes = self._tokens(views, masks)
        patches = sizes[0][:, 1:].flatten(0, 1)
        patches = patches if patch_indices is None else patches[patch_indices]
        return torch.cat([*(tokens[:, 0] for tokens in sizes), patches])


def _check(global_crops: Tensor, masks: Tensor | None) -> None:
    if global_crops.dim() != 5:
        raise ValueError(
            f"global crops of shape {list(global_crops.shape)}: expected [V, B, 3, S, S]"
        )
    if masks is not None and masks.shape[:2] != global_crops.shape[:2]:
        raise ValueError(
            f"masks {list(masks.shape)} for global crops {list(global_crops.shape)}:"
            " expected [V, B, h, w] with the same V and B"
        )
