"""The cascade of three box heads and mask heads (Cascade R-CNN, arXiv 1712.00726), which no library
on PyPI carries. Each stage is torchvision's `RoIHeads`; the order of their steps and the losses
follow mmdetection's `CascadeRoIHead` with GIoU loss on decoded boxes, as iBOT configures it.

In shapes: n boxes of an image, R boxes of a batch, K classes without background, which is class 0.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import box_area, clip_boxes_to_image, generalized_box_iou_loss, roi_align
from torchvision.ops._utils import convert_boxes_to_roi_format

from ibeton.evaluation.dense.pyramid import STRIDES

Truth = list[dict[str, Tensor]]
Sizes = list[tuple[int, int]]
# Of each stage: the IoU from which a box is an object, deviations of the deltas of centers and of
# sizes, weight of the losses
STAGES = ((0.5, 0.1, 0.2, 1.0), (0.6, 0.05, 0.1, 0.5), (0.7, 0.033, 0.067, 0.25))
SAMPLES, POSITIVE = 512, 0.25  # boxes of an image to learn from, and the share of objects
GIOU_WEIGHT = 10.0
BOX_SIDE, MASK_SIDE, HIDDEN = 7, 14, 1024


class Sampler(BalancedPositiveNegativeSampler):
    """torchvision's random choice of boxes, drawn for each image from its seed in `draws`."""

    draws: list[int]

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks uint8 of the chosen positives (label above 0) and negatives (0) of each image."""
        positive, negative = [], []
        with torch.random.fork_rng(devices=[]):
            for own, draw in zip(labels, self.draws, strict=True):
                torch.default_generator.manual_seed(draw)
                masks = super().__call__([own.cpu()])
                positive.append(masks[0][0].to(own.device))
                negative.append(masks[1][0].to(own.device))
        return positive, negative


class Chosen(NamedTuple):
    """Boxes to learn from; lists have an item for each image."""

    boxes: list[Tensor]  # float32 [n, 4]
    labels: list[Tensor]  # int64 [n], 0 for background
    objects: list[Tensor]  # int64 [n], which object each box is, where it is one
    given: list[Tensor]  # bool [n], whether the box is the truth's own


class Stage(RoIHeads):
    """The heads of a stage, with torchvision's matching, sampling and suppression."""

    def __init__(
        self, channels: int, classes: int, iou: float, center: float, size: float, weight: float
    ) -> None:
        shape, convs = (channels, BOX_SIDE, BOX_SIDE), [channels] * 4
        super().__init__(
            box_roi_pool=None,
            box_head=FastRCNNConvFCHead(shape, convs, [HIDDEN], nn.BatchNorm2d),
            box_predictor=FastRCNNPredictor(HIDDEN, 1 + classes),
            fg_iou_thresh=iou,
            bg_iou_thresh=iou,
            batch_size_per_image=SAMPLES,
            positive_fraction=POSITIVE,
            bbox_reg_weights=(1 / center, 1 / center, 1 / size, 1 / size),
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            mask_head=MaskRCNNHeads(channels, convs, 1),
            mask_predictor=MaskRCNNPredictor(channels, channels, 1 + classes),
        )
        self.weight, self.fg_bg_sampler = weight, Sampler(SAMPLES, POSITIVE)
        scores, deltas = self.box_predictor.cls_score, self.box_predictor.bbox_pred
        for layer, std in ((scores, 0.01), (deltas, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def choose(self, proposals: list[Tensor], truth: Truth) -> Chosen:
        """What to learn from, among the proposals and the objects' own boxes."""
        own, classes = ([target[name] for target in truth] for name in ("boxes", "labels"))
        every = self.add_gt_proposals(proposals, own)
        objects, labels = self.assign_targets_to_proposals(every, own, classes)
        parts = []
        for boxes, label, match, rows, before in zip(
            every, labels, objects, self.subsample(labels), proposals, strict=True
        ):
            match = match[rows][label[rows] > 0]
            parts.append((boxes[rows], label[rows], match, rows >= len(before)))
        return Chosen(*map(list, zip(*parts, strict=True)))

    def boxes(self, maps: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits [R, 1 + K] and box deltas [R, 4 (1 + K)] of boxes."""
        logits, deltas = self.box_predictor(self.box_head(pool(maps, boxes, BOX_SIDE)))
        return logits.float(), deltas.float()

    def moved(self, deltas: Tensor, boxes: list[Tensor]) -> Tensor:
        """Boxes moved by the deltas of each class, [R, 1 + K, 4]."""
        return self.box_coder.decode_single(deltas, torch.cat(boxes)).unflatten(1, (-1, 4))

    def masks(self, features: Tensor) -> Tensor:
        """Mask logits [R, 1 + K, 28, 28] of features [R, C, 14, 14]."""
        return self.mask_predictor(self.mask_head(features)).float()

    def mask_loss(self, maps: list[Tensor], chosen: Chosen, truth: Truth) -> Tensor:
        """Binary cross-entropy of the masks of objects, each for its own class; its mean over a
        mask's pixels, as a sum over objects."""
        boxes = [b[own > 0] for b, own in zip(chosen.boxes, chosen.labels, strict=True)]
        logits = self.masks(pool(maps, boxes, MASK_SIDE))
        masks, classes = ([target[name] for target in truth] for name in ("masks", "labels"))
        return maskrcnn_loss(logits, boxes, masks, classes, chosen.objects) * len(logits)


class Cascade(nn.Module):
    """Proposals -> losses, or boxes, classes, scores and masks."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        stages = [Stage(channels, classes, *settings) for settings in STAGES]
        self.stages: Any = nn.ModuleList(stages)

    def losses(
        self, maps: list[Tensor], proposals: list[Tensor], truth: Truth, sizes: Sizes
    ) -> dict[str, Tensor]:
        """Weighted losses by stage: "class0", "box0", "mask0" and so on."""
        losses = {}
        for i, stage in enumerate(self.stages):
            chosen = stage.choose(proposals, truth)
            labels = torch.cat(chosen.labels)
            positive = labels > 0
            logits, deltas = stage.boxes(maps, chosen.boxes)
            moved = stage.moved(deltas, chosen.boxes)
            own = torch.cat([t["boxes"][o] for t, o in zip(truth, chosen.objects, strict=True)])
            giou = generalized_box_iou_loss(moved[positive, labels[positive]], own, reduction="sum")
            entropy = F.cross_entropy(logits, labels, reduction="sum")
            samples, objects = (over_ranks(len(x), x.device) for x in (labels, own))
            losses[f"class{i}"] = stage.weight * entropy / samples
            losses[f"box{i}"] = stage.weight * GIOU_WEIGHT * giou / samples
            losses[f"mask{i}"] = stage.weight * stage.mask_loss(maps, chosen, truth) / objects
            # For the next stage: objects by their own class, the rest by the likeliest.
            classes = torch.where(positive, labels, 1 + logits[:, 1:].argmax(1))
            refined = of_class(moved.detach(), classes, chosen.boxes, sizes)
            proposals = [new[~given] for new, given in zip(refined, chosen.given, strict=True)]
        return losses

    def detect(
        self, maps: list[Tensor], proposals: list[Tensor], sizes: Sizes
    ) -> list[dict[str, Tensor]]:
        """Of each image `boxes` [n, 4], `scores` [n], `labels` [n] and `masks` [n, 1, 28, 28],
        those as probabilities within the box. Class logits and masks are means over the stages."""
        every, refined = [], proposals
        for stage in self.stages:
            boxes = refined
            logits, deltas = stage.boxes(maps, boxes)
            classes = 1 + logits[:, 1:].argmax(1)
            refined = of_class(stage.moved(deltas, boxes), classes, boxes, sizes)
            every.append(logits)
        mean = torch.stack(every).mean(0)
        boxes, scores, labels = stage.postprocess_detections(mean, deltas, boxes, sizes)
        features = pool(maps, boxes, MASK_SIDE)
        by_stage = [maskrcnn_inference(stage.masks(features), labels) for stage in self.stages]
        masks = [torch.stack(own).mean(0) for own in zip(*by_stage, strict=True)]
        names, found = ("boxes", "scores", "labels", "masks"), (boxes, scores, labels, masks)
        return [dict(zip(names, one, strict=True)) for one in zip(*found, strict=True)]


def pool(maps: list[Tensor], boxes: list[Tensor], side: int) -> Tensor:
    """Features [R, C, side, side] of boxes, each from the map that fits its size (FPN, arXiv
    1612.03144, equation 1). Unlike torchvision's `MultiScaleRoIAlign`, pixels are aligned."""
    rois = convert_boxes_to_roi_format(boxes)
    level = (box_area(rois[:, 1:]).sqrt() / 56 + 1e-6).log2().floor().clamp(0, 3)
    out = maps[0].new_zeros(len(rois), maps[0].shape[1], side, side, dtype=torch.float32)
    for i, (features, stride) in enumerate(zip(maps, STRIDES, strict=True)):
        own = (level == i).nonzero()[:, 0]
        part = roi_align(features.float(), rois[own], side, 1 / stride, aligned=True)
        out = out.index_copy(0, own, part)
    return out


def over_ranks(count: int, device: torch.device) -> Tensor:
    """The mean count of all ranks, at least 1: losses divided by it do not depend on how images
    are shared among ranks. mmdetection divides by each rank's own."""
    total = torch.tensor(float(count), device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total.clamp(min=1)


def of_class(moved: Tensor, classes: Tensor, boxes: list[Tensor], sizes: Sizes) -> list[Tensor]:
    """Of boxes moved for every class [R, 1 + K, 4] those of their classes [R], for each image,
    within it."""
    own = moved[torch.arange(len(classes), device=classes.device), classes]
    parts = own.split([len(one) for one in boxes])
    return [clip_boxes_to_image(part, size) for part, size in zip(parts, sizes, strict=True)]
