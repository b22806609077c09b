"""Backbone and head as one network: what the student and the teacher each are.

What a backbone must offer: called as `backbone(images [B, 3, H, W], masks bool [B, h, w] or None)`
it gives tokens [B, 1 + N, C], the class token first, for images of any size that it tiles; N is h *
w, and masks may be asked of a student alone. It may offer `forward_views` as `VisionTransformer`
does, to take all crop sizes at once and to give only the patches that are wanted; without it the
sizes go one after the other. `masked_embed` is the parameter that the student alone has.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ibeton.model.head import IBOTHead

Logits = tuple[Tensor, Tensor, Tensor | None]  # class, patch, local class
Views = list[tuple[Tensor, Tensor]]  # class tokens [B, C] and patch tokens of each crop size


class Targets(NamedTuple):
    """What the teacher says of a batch."""

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
        places: Tensor | None = None,  # int64 [M], places among V * B * N patches
    ) -> Logits:
        """Class logits [V * B, K], patch logits [M, K2] of the patches in `places` ([V * B, N,
        K2] of all without it) and local class logits [L * B, K] (None without local views),
        view-major.

        One call takes all views, so that a wrapper such as DDP sees one forward a step. Local views
        are never masked (published code). Raises ValueError for crops or masks of other shapes.
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
            (cls, patch), local_cls = encoded[0], [cls for cls, _ in encoded[1:]]
            if places is not None:
                patch = patch.flatten(0, 1)[places]
        else:
            none = torch.empty(0, dtype=torch.int64, device=global_crops.device)
            tokens = self._views(views, flat_masks, [places, none][: len(views)])
            cls, patch, local_cls = self._encode_together(tokens)
        logits, patch_logits = self.head.prototypes(torch.cat([cls, *local_cls]), patch)
        rows = len(views[0])
        return logits[:rows], patch_logits, logits[rows:] if local_cls else None

    def targets(self, global_crops: Tensor, places: Tensor) -> Targets:
        """What the teacher says: prototypes of class tokens and of the patches in `places`.

        The center needs the mean logits of all patches. The last layer is linear, so the mean is
        taken before it: one row through the prototypes instead of V * B * N, and equal.
        """
        _check(global_crops, None)
        [(cls, patches)] = self._views([global_crops.flatten(0, 1)], [None], [None])
        cls, patches = self._encode(cls, patches)
        cls_logits, patch_logits = self.head.prototypes(cls, patches.flatten(0, 1)[places])
        with torch.autocast(global_crops.device.type, enabled=False):
            mean = self.head.last_layer2(patches.mean(dim=(0, 1)))
        return Targets(cls_logits, patch_logits, mean)

    def _views(
        self, views: list[Tensor], masks: list[Tensor | None], wanted: list[Tensor | None]
    ) -> Views:
        if hasattr(self.backbone, "forward_views"):
            return cast(Any, self.backbone).forward_views(views, masks, wanted)
        return views_one_by_one(self.backbone, views, masks, wanted)

    def _encode(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C] and [B, N, C] -> unit vectors [B, D], [B, N, D]."""
        encoded = self.head.bottleneck(torch.cat([cls.unsqueeze(1), patches], dim=1))
        return encoded[:, 0], encoded[:, 1:]

    def _encode_together(self, tokens: Views) -> tuple[Tensor, Tensor, list[Tensor]]:
        """All tokens in one pass of the head's MLP -> unit vectors of class token, patches, and
        class token of the local views if any. Patches keep their leading dimensions."""
        patches = tokens[0][1]
        rows = [cls for cls, _ in tokens] + [patches.flatten(0, -2)]
        cls, *local_cls, patch = self.head.bottleneck(torch.cat(rows)).split([len(r) for r in rows])
        return cls, patch.unflatten(0, patches.shape[:-1]), local_cls


def views_one_by_one(
    backbone: nn.Module,
    views: list[Tensor],
    masks: list[Tensor | None],
    wanted: list[Tensor | None],
) -> Views:
    """As `VisionTransformer.forward_views`, for any backbone: a pass for each crop size."""
    outputs = []
    for x, mask, places in zip(views, masks, wanted, strict=True):
        tokens = backbone(x) if mask is None else backbone(x, mask)
        patches = tokens[:, 1:]
        if places is not None:
            patches = patches.flatten(0, 1)[places]
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
