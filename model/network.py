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
Views = list[tuple[Tensor, Tensor]]  # class tokens [B, C] and patch tokens of each crop size


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
        views, flat_masks = [global_crops.flatten(0, 1)], [masks]
        if masks is not None:
            flat_masks = [masks.flatten(0, 1)]
        if local_crops is not None and len(local_crops):
            views.append(local_crops.flatten(0, 1))
            flat_masks.append(None)
        if self.head.couples_tokens():  # statistics over every token of a crop size
            tokens = self._views(views, flat_masks, [None] * len(views))
            encoded = [self._encode(cls, patches) for cls, patches in tokens]
            patch = encoded[0][1]
            if patch_indices is not None:
                patch = patch.flatten(0, 1)[patch_indices]
            cls = torch.cat([cls for cls, _ in encoded])
        else:
            cls, patch = self._encode_selected(views, flat_masks, patch_indices)
        logits, patch_logits = self.head.prototypes(cls, patch)
        rows = len(views[0])
        return logits[:rows], patch_logits, logits[rows:] if len(views) > 1 else None

    def targets(self, global_crops: Tensor, patch_indices: Tensor) -> Targets:
        """The teacher's logits of class tokens and of the patches in `patch_indices`.

        The center needs the mean logits of all patches. The last layer is linear, so averaging
        before it gives the same mean from one row instead of V * B * N.
        """
        _check(global_crops, None)
        backbone = cast(Any, self.backbone)
        embed = getattr(backbone, "tokens_for_product", backbone)
        units, mean = self.head.bottleneck_and_mean(embed(global_crops.flatten(0, 1)))
        rows = (
            patch_indices + patch_indices // (units.shape[1] - 1) + 1
        )  # with class tokens between
        patches = units.flatten(0, 1).index_select(0, rows)
        return Targets(*self.head.target_logits(units[:, 0], patches, mean))

    def _views(
        self, views: list[Tensor], masks: list[Tensor | None], indices: list[Tensor | None]
    ) -> Views:
        if hasattr(self.backbone, "forward_views"):
            return cast(Any, self.backbone).forward_views(views, masks, indices)
        return views_one_by_one(self.backbone, views, masks, indices)

    def _encode(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C] and [B, N, C] -> unit vectors [B, D], [B, N, D]."""
        encoded = self.head.bottleneck(torch.cat([cls.unsqueeze(1), patches], dim=1))
        return encoded[:, 0], encoded[:, 1:]

    def _encode_selected(
        self, views: list[Tensor], masks: list[Tensor | None], patch_indices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Unit vectors of the class tokens of all views, and of the patches in `patch_indices` (all
        patches: [V * B, N, D]), from one pass of the head's MLP."""
        rows, leading = self._rows(views, masks, patch_indices)
        classes = sum(len(view) for view in views)
        cls, patch = self.head.bottleneck(rows).split([classes, len(rows) - classes])
        return cls, patch.unflatten(0, leading)

    def _rows(
        self, views: list[Tensor], masks: list[Tensor | None], patch_indices: Tensor | None
    ) -> tuple[Tensor, torch.Size]:
        """Class tokens of all views and then patches, [R, C], and the leading dimensions that the
        patches have."""
        if patch_indices is not None and hasattr(self.backbone, "selected"):
            rows = cast(Any, self.backbone).selected(views, masks, patch_indices)
            return rows, patch_indices.shape
        none = torch.empty(0, dtype=torch.int64, device=views[0].device)
        indices = [patch_indices, *[none] * (len(views) - 1)]
        tokens = self._views(views, masks, indices)
        patches = tokens[0][1]
        rows = torch.cat([*(cls for cls, _ in tokens), patches.flatten(0, -2)])
        return rows, patches.shape[:-1]


def views_one_by_one(
    backbone: nn.Module,
    views: list[Tensor],
    masks: list[Tensor | None],
    indices: list[Tensor | None],
) -> Views:
    """`VisionTransformer.forward_views` for any backbone: one pass for each crop size."""
    outputs = []
    for x, mask, patch_indices in zip(views, masks, indices, strict=True):
        tokens = backbone(x) if mask is None else backbone(x, mask)
        patches = tokens[:, 1:]
        if patch_indices is not None:
            patches = patches.flatten(0, 1)[patch_indices]
        outputs.append((tokens[:, 0], patches))
    return outputs


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
