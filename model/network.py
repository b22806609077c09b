"""Backbone and head as one network: what the student and the teacher each are."""

from torch import Tensor, nn

from model.head import IBOTHead
from model.vit import VisionTransformer

Logits = tuple[Tensor, Tensor, Tensor | None]  # class, patch, local class


class Network(nn.Module):
    """Views of a batch -> logits over prototypes. State keys are `backbone.*` and `head.*`."""

    def __init__(self, backbone: VisionTransformer, head: IBOTHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(
        self,
        global_crops: Tensor,  # [V, B, 3, S, S]
        local_crops: Tensor | None = None,  # [L, B, 3, s, s]
        masks: Tensor | None = None,  # bool [V, B, h, w], True = masked; global views only
    ) -> Logits:
        """Class logits [V * B, K], patch logits [V * B, N, K2] and local class logits [L * B, K]
        (None without local views), view-major.

        One call takes all views, so that a wrapper such as DDP sees one forward a step. Local views
        are never masked (published code). Raises ValueError for crops or masks of other shapes.
        """
        if global_crops.dim() != 5:
            raise ValueError(
                f"global crops of shape {list(global_crops.shape)}: expected [V, B, 3, S, S]"
            )
        if masks is not None and masks.shape[:2] != global_crops.shape[:2]:
            raise ValueError(
                f"masks {list(masks.shape)} for global crops {list(global_crops.shape)}:"
                " expected [V, B, h, w] with the same V and B"
            )
        flat_masks = None if masks is None else masks.flatten(0, 1)
        tokens = self.backbone(global_crops.flatten(0, 1), flat_masks)
        cls, patch = self.head(tokens)
        if local_crops is None or len(local_crops) == 0:
            return cls, patch, None
        return cls, patch, self._local_cls(local_crops)

    def _local_cls(self, local_crops: Tensor) -> Tensor:
        """Only the class token needs the head, unless batch statistics want every token."""
        tokens = self.backbone(local_crops.flatten(0, 1))
        if self.head.couples_tokens():
            return self.head(tokens)[0]
        return self.head.cls_logits(tokens[:, 0])
