"""The cascade of three box heads and mask heads (Cascade R-CNN, arXiv 1712.00726), which no library
on PyPI carries. Heads are torchvision's; matching, sampling and scoring follow mmdetection's
`CascadeRoIHead` with GIoU loss on decoded boxes, as iBOT's configuration sets them.

In shapes: n boxes of an image, R boxes of a batch, K classes without background, which is class 0.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_loss
from torchvision.ops import (
    batched_nms,
    box_area,
    box_iou,
    clip_boxes_to_image,
    generalized_box_iou_loss,
    roi_align,
)

from ibeton.evaluation.dense.pyramid import STRIDES

Truth = list[dict[str, Tensor]]
Sizes = list[tuple[int, int]]


class Stage(NamedTuple):
    """Settings of a stage: IoU from which a box is an object, deviations of the deltas, weight."""

    iou: float
    center_std: float
    size_std: float
    weight: float


STAGES = (Stage(0.5, 0.1, 0.2, 1.0), Stage(0.6, 0.05, 0.1, 0.5), Stage(0.7, 0.033, 0.067, 0.25))
SAMPLES, POSITIVE = 512, 0.25  # boxes of an image to learn from, and the share of objects
GIOU_WEIGHT = 10.0
SCORE, NMS, DETECTIONS = 0.05, 0.5, 100
BOX_SIDE, MASK_SIDE = 7, 14


class Sampler:
    """A balanced random choice of boxes whose draws follow from `draws`, an int per image, alone;
    called as torchvision calls its `BalancedPositiveNegativeSampler`."""

    def __init__(self, samples: int, positive: float) -> None:
        self.samples, self.positive = samples, positive
        self.draws: list[int] = []

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks uint8 of the chosen positives (label above 0) and negatives (0) of each image."""
        chosen = [self.choose(own, draw) for own, draw in zip(labels, self.draws, strict=True)]
        return [own for own, _ in chosen], [own for _, own in chosen]

    def choose(self, labels: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        generator, masks, left = torch.Generator().manual_seed(draw), [], self.samples
        for one_of, most in ((labels >= 1, int(self.samples * self.positive)), (labels == 0, left)):
            places = one_of.nonzero()[:, 0]
            order = torch.randperm(len(places), generator=generator)[: min(most, left)]
            left -= len(order)
            masks.append(torch.zeros_like(labels, dtype=torch.uint8))
            masks[-1][places[order.to(places.device)]] = 1
        return masks[0], masks[1]


class Chosen(NamedTuple):
    """Boxes of an image to learn from, objects first."""

    boxes: Tensor  # float32 [n, 4]
    labels: Tensor  # int64 [n], 0 for background
    objects: Tensor  # int64 [m], which object each of the first m boxes is
    given: Tensor  # bool [n], whether the box is the truth's own


class BoxHead(nn.Module):
    """Features [R, C, 7, 7] -> class logits [R, 1 + K] and box deltas [R, 1 + K, 4]."""

    def __init__(self, channels: int, classes: int, width: int = 1024) -> None:
        super().__init__()
        shape = (channels, BOX_SIDE, BOX_SIDE)
        self.convs = FastRCNNConvFCHead(shape, [channels] * 4, [width], nn.BatchNorm2d)
        self.predictor = FastRCNNPredictor(width, 1 + classes)
        for layer, std in ((self.predictor.cls_score, 0.01), (self.predictor.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = self.predictor(self.convs(features))
        return logits.float(), deltas.float().unflatten(1, (-1, 4))


class Cascade(nn.Module):
    """Proposals -> losses, or boxes, classes, scores and masks."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.boxes = nn.ModuleList(BoxHead(channels, classes) for _ in STAGES)
        self.masks = nn.ModuleList(
            nn.Sequential(
                MaskRCNNHeads(channels, [channels] * 4, 1),
                MaskRCNNPredictor(channels, channels, 1 + classes),
            )
            for _ in STAGES
        )
        self.sampler = Sampler(SAMPLES, POSITIVE)

    def losses(
        self, maps: list[Tensor], proposals: list[Tensor], truth: Truth, sizes: Sizes
    ) -> dict[str, Tensor]:
        """Weighted losses by stage: "class0", "box0", "mask0" and so on."""
        losses = {}
        for i, stage in enumerate(STAGES):
            chosen = self.choose(proposals, truth, i)
            boxes, labels = [c.boxes for c in chosen], torch.cat([c.labels for c in chosen])
            logits, deltas = self.boxes[i](pool(maps, boxes, BOX_SIDE))
            positive = labels > 0
            own = torch.cat([t["boxes"][c.objects] for t, c in zip(truth, chosen, strict=True)])
            moved = decode(deltas[positive, labels[positive]], torch.cat(boxes)[positive], stage)
            giou = generalized_box_iou_loss(moved, own, reduction="sum")
            entropy = F.cross_entropy(logits, labels, reduction="sum")
            samples, objects = (over_ranks(len(x), x.device) for x in (labels, own))
            losses[f"class{i}"] = stage.weight * entropy / samples
            losses[f"box{i}"] = stage.weight * GIOU_WEIGHT * giou / samples
            losses[f"mask{i}"] = stage.weight * self.mask_loss(i, maps, chosen, truth) / objects
            # For the next stage: objects by their own class, the rest by the likeliest.
            by = torch.where(positive, labels, likeliest(logits))
            refined = refine(deltas, by, boxes, stage, sizes)
            proposals = [new[~c.given] for new, c in zip(refined, chosen, strict=True)]
        return losses

    @torch.no_grad()
    def choose(self, proposals: list[Tensor], truth: Truth, stage: int) -> list[Chosen]:
        """What each image has to learn from at a stage: proposals and the objects themselves."""
        chosen, matcher = [], Matcher(STAGES[stage].iou, STAGES[stage].iou)
        for own, target, draw in zip(proposals, truth, self.sampler.draws, strict=True):
            boxes, count = torch.cat([target["boxes"], own]), len(target["boxes"])
            match = torch.full((len(boxes),), -1, device=boxes.device)
            if count:
                match = matcher(box_iou(target["boxes"], boxes))
            labels = F.pad(target["labels"], (0, 1))[match]  # -1, the last one, is background
            masks = self.sampler.choose(labels, draw + stage + 1)
            rows = torch.cat([mask.nonzero()[:, 0] for mask in masks])
            objects = match[rows][labels[rows] > 0]
            chosen.append(Chosen(boxes[rows], labels[rows], objects, rows < count))
        return chosen

    def mask_loss(
        self, stage: int, maps: list[Tensor], chosen: list[Chosen], truth: Truth
    ) -> Tensor:
        """Binary cross-entropy of the masks of objects, each for its own class; its mean over a
        mask's pixels, as a sum over objects."""
        boxes = [c.boxes[: len(c.objects)] for c in chosen]
        logits = self.masks[stage](pool(maps, boxes, MASK_SIDE)).float()
        masks, labels = ([target[name] for target in truth] for name in ("masks", "labels"))
        own = [c.objects for c in chosen]
        return maskrcnn_loss(logits, boxes, masks, labels, own) * len(logits)

    def detect(
        self, maps: list[Tensor], proposals: list[Tensor], sizes: Sizes
    ) -> list[dict[str, Tensor]]:
        """Of each image `boxes` [n, 4], `labels` [n], `scores` [n] and `masks` [n, 28, 28], those
        as probabilities within the box. Class logits and masks are means over the stages."""
        every, boxes = [], proposals
        for i, stage in enumerate(STAGES):
            logits, deltas = self.boxes[i](pool(maps, boxes, BOX_SIDE))
            every.append(logits)
            if i < len(STAGES) - 1:
                boxes = refine(deltas, likeliest(logits), boxes, stage, sizes)
        counts = [len(own) for own in boxes]
        scores = torch.stack(every).mean(0).softmax(1)[:, 1:].split(counts)  # [n, K] of each image
        classes = deltas.shape[1] - 1
        by_class = torch.cat(boxes).repeat_interleave(classes, 0)
        moved = decode(deltas[:, 1:].flatten(0, 1), by_class, stage).unflatten(0, (-1, classes))
        found = [best(*one) for one in zip(moved.split(counts), scores, sizes, strict=True)]
        pooled = pool(maps, [f["boxes"] for f in found], MASK_SIDE)
        labels = torch.cat([f["labels"] for f in found])
        masks = torch.stack([head(pooled).float().sigmoid() for head in self.masks]).mean(0)
        own = masks[torch.arange(len(labels), device=labels.device), labels]
        parts = own.split([len(f["boxes"]) for f in found])
        return [{**f, "masks": m} for f, m in zip(found, parts, strict=True)]


def pool(maps: list[Tensor], boxes: list[Tensor], side: int) -> Tensor:
    """Features [R, C, side, side] of boxes, each from the map that fits its size (FPN, arXiv
    1612.03144, equation 1). Unlike torchvision's `MultiScaleRoIAlign`, pixels are aligned."""
    rows = [torch.full_like(own[:, :1], i) for i, own in enumerate(boxes)]
    rois = torch.cat([torch.cat(pair, dim=1) for pair in zip(rows, boxes, strict=True)])
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


def likeliest(logits: Tensor) -> Tensor:
    """The classes [R] of the largest logits [R, 1 + K], background aside."""
    return 1 + logits[:, 1:].argmax(1)


def decode(deltas: Tensor, boxes: Tensor, stage: Stage) -> Tensor:
    """Boxes [R, 4] moved by deltas [R, 4]."""
    weights = (1 / stage.center_std,) * 2 + (1 / stage.size_std,) * 2
    return BoxCoder(weights).decode_single(deltas, boxes)


@torch.no_grad()
def refine(
    deltas: Tensor, classes: Tensor, boxes: list[Tensor], stage: Stage, sizes: Sizes
) -> list[Tensor]:
    """The boxes of each image, moved by the deltas [R, 1 + K, 4] of their classes [R]."""
    own = deltas[torch.arange(len(classes), device=classes.device), classes]
    moved = decode(own, torch.cat(boxes), stage).split([len(b) for b in boxes])
    return [clip_boxes_to_image(part, size) for part, size in zip(moved, sizes, strict=True)]


def best(boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """What is left of boxes [n, K, 4] with scores [n, K] after the threshold and a suppression by
    class."""
    rows, classes = (scores > SCORE).nonzero(as_tuple=True)
    boxes, scores = clip_boxes_to_image(boxes[rows, classes], size), scores[rows, classes]
    keep = batched_nms(boxes, scores, classes, NMS)[:DETECTIONS]
    return {"boxes": boxes[keep], "labels": 1 + classes[keep], "scores": scores[keep]}
