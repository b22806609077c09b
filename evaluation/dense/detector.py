"""Cascade Mask R-CNN on a pyramid: torchvision's FPN and region proposals, our cascade."""

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ibeton.evaluation.dense.cascade import Cascade, Sampler, Sizes, Truth
from ibeton.evaluation.dense.pyramid import STRIDES, Pyramid
from ibeton.evaluation.frozen.features import check_finite

RPN_STRIDES = (*STRIDES, 64)
ANCHOR = 8  # side of an anchor in strides
RATIOS = (0.5, 1.0, 2.0)
# Images [B, 3, H, W], their sizes within it, and of each image `boxes`, `labels` and `masks`
Batch = tuple[Tensor, Sizes, Truth]


class Anchors(AnchorGenerator):
    """torchvision's anchors with the strides given instead of divided out, as an uneven map on top
    would shift them."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        first = feature_maps[0]
        self.set_cell_anchors(torch.float32, first.device)
        strides = [[torch.tensor(stride, device=first.device)] * 2 for stride in RPN_STRIDES]
        grids = [list(m.shape[2:]) for m in feature_maps]
        return [torch.cat(self.grid_anchors(grids, strides))] * len(first)


class ProposalHead(RPNHead):
    """torchvision's head of the proposals, with outputs in float32 under autocast too."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [m.float() for m in logits], [m.float() for m in deltas]


class Detector(nn.Module):
    """Boxes, classes and masks of objects. `width` is the FPN's, 256 as published."""

    def __init__(self, backbone: nn.Module, classes: int, width: int = 256) -> None:
        super().__init__()
        self.pyramid = Pyramid(backbone, norm=False)
        self.fpn = FeaturePyramidNetwork(self.pyramid.channels, width, LastLevelMaxPool())
        sizes = tuple((ANCHOR * stride,) for stride in RPN_STRIDES)
        self.rpn = RegionProposalNetwork(
            Anchors(sizes, (RATIOS,) * len(sizes)),
            ProposalHead(width, len(RATIOS)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 2000, "testing": 1000},
            nms_thresh=0.7,
        )
        self.rpn.fg_bg_sampler = Sampler(256, 0.5)
        self.cascade = Cascade(width, classes)

    def _proposals(
        self, images: Tensor, sizes: Sizes, truth: Truth | None
    ) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
        levels = self.pyramid(images)
        maps = self.fpn({str(i): level for i, level in enumerate(levels)})
        proposals, losses = self.rpn(ImageList(images, sizes), maps, truth)
        return list(maps.values())[: len(STRIDES)], proposals, losses

    def forward(self, batch: Batch, draws: list[int]) -> dict[str, Tensor]:
        """Losses of a batch; "loss" is the sum of the others. `draws` has a seed for each image."""
        images, sizes, truth = batch
        for i, heads in enumerate((self.rpn, *self.cascade.stages)):
            heads.fg_bg_sampler.draws = [draw + i for draw in draws]
        maps, proposals, losses = self._proposals(images, sizes, truth)
        losses |= self.cascade.losses(maps, proposals, truth, sizes)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def detect(self, images: Tensor, sizes: Sizes) -> list[dict[str, Tensor]]:
        """What is found in each image, see `Cascade.detect`; in eval mode. Raises ValueError for
        maps that are not finite."""
        maps, proposals, _ = self._proposals(images, sizes, None)
        check_finite(*maps)
        return self.cascade.detect(maps, proposals, sizes)
