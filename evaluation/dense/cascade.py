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
from torchvision.ops import (
    batched_nms,
    box_area,
    box_iou,
    clip_boxes_to_image,
    generalized_box_iou_loss,
    roi_align,
)

Truth = list[dict[str, Tensor]]


class Stage(NamedTuple):
    """Settings of a stage: IoU from which a box is an object, deviations of the deltas, weight."""

    iou: float
    center_std: float
    size_std: float
    weight: float


STAGES = (Stage(0.5, 0.1, 0.2, 1.0), Stage(0.6, 0.05, 0.1, 0.5), Stage(0.7, 0.033, 0.067, 0.25))
STRIDES = (4, 8, 16, 32)
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


def pool(maps: list[Tensor], boxes: list[Tensor], side: int) -> Tensor:
    """Features [R, C, side, side] of boxes, each from the map that fits its size (FPN, arXiv
    1612.03144, equation 1). Unlike torchvision's `MultiScaleRoIAlign`, pixels are aligned."""
    rows = [torch.full_like(own[:, :1], i) for i, own in enumerate(boxes)]
    rois = torch.cat([torch.cat(pair, dim=1) for pair in zip(rows, boxes, strict=True)])
    level = (box_area(rois[:, 1:]).sqrt() / 56 + 1e-6).log2().floor().clamp(0, 3)
    out = maps[0].new_zeros(len(rois), maps[0].shape[1], side, side, dtype=torch.float32)
    for i, (features, stride) in enumerate(zip(maps, STRIDES, strict=True)):
        own = (level == i).nonzero()[:, 0]
        part = roi_align(features.float(), rois[own], side, 1 / stride, 0, aligned=True)
        out = out.index_copy(0, own, part)
    return out


class BoxHead(nn.Module):
    """Features [R, C, 7, 7] -> class logits [R, 1 + K] and box deltas [R, 1 + K, 4]."""

    def __init__(self, channels: int, classes: int, width: int = 1024) -> None:
        super().__init__()
        shape = (channels, BOX_SIDE, BOX_SIDE)
        self.convs = FastRCNNConvFCHead(shape, [channels] * 4, [width], nn.BatchNorm2d)
        self.predictor = FastRCNNPredictor(width, 1 + classes)
        nn.init.normal_(self.predictor.cls_score.weight, std=0.01)
        nn.init.normal_(self.predictor.bbox_pred.weight, std=0.001)
        for layer in (self.predictor.cls_score, self.predictor.bbox_pred):
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
        self,
        maps: list[Tensor],
        proposals: list[Tensor],
        truth: Truth,
        sizes: list[tuple[int, int]],
    ) -> dict[str, Tensor]:
        """Weighted losses by stage: "class0", "box0", "mask0" and so on."""
        losses = {}
        for i, stage in enumerate(STAGES):
            boxes, labels, matched, own = self.sample(proposals, truth, stage.iou, i)
            logits, deltas = self.boxes[i](pool(maps, boxes, BOX_SIDE))
            every, of = torch.cat(boxes), torch.cat(labels)
            positive = of > 0
            targets = torch.cat([t["boxes"][m] for t, m in zip(truth, matched, strict=True)])
            moved = decode(deltas[positive, of[positive]], every[positive], stage)
            giou = generalized_box_iou_loss(moved, targets, reduction="sum")
            samples, objects = over_ranks(len(of), of.device), over_ranks(len(targets), of.device)
            entropy = F.cross_entropy(logits, of, reduction="sum")
            mask = self.mask_loss(i, maps, boxes, labels, matched, truth)
            losses[f"class{i}"] = stage.weight * entropy / samples
            losses[f"box{i}"] = stage.weight * GIOU_WEIGHT * giou / samples
            losses[f"mask{i}"] = stage.weight * mask / objects
            # For the next stage: objects by their own class, the rest by the likeliest.
            with torch.no_grad():
                by = torch.where(positive, of, 1 + logits[:, 1:].argmax(1))
                moved = decode(deltas[torch.arange(len(by)), by], every, stage)
                parts = moved.split([len(b) for b in boxes])
                proposals = [
                    clip_boxes_to_image(part[~o], size)
                    for part, o, size in zip(parts, own, sizes, strict=True)
                ]
        return losses

    @torch.no_grad()
    def sample(
        self, proposals: list[Tensor], truth: Truth, iou: float, stage: int
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Of each image, boxes to learn from [n, 4], objects first; their labels [n], 0 for
        background; the object of each of the positives; and which boxes are the truth's own."""
        out: tuple[list[Tensor], ...] = ([], [], [], [])
        matcher = Matcher(iou, iou)
        for own, target, draw in zip(proposals, truth, self.sampler.draws, strict=True):
            boxes, objects = torch.cat([target["boxes"], own]), len(target["boxes"])
            match = torch.full((len(boxes),), -1, device=boxes.device)
            if objects:
                match = matcher(box_iou(target["boxes"], boxes))
            labels = torch.zeros_like(match)
            labels[match >= 0] = target["labels"][match[match >= 0]]
            positive, negative = self.sampler.choose(labels, draw + stage + 1)
            rows = torch.cat([positive.nonzero()[:, 0], negative.nonzero()[:, 0]])
            chosen = match[rows]
            for into, values in zip(
                out, (boxes[rows], labels[rows], chosen[chosen >= 0], rows < objects), strict=True
            ):
                into.append(values)
        return out  # type: ignore[return-value]

    def mask_loss(
        self,
        stage: int,
        maps: list[Tensor],
        boxes: list[Tensor],
        labels: list[Tensor],
        matched: list[Tensor],
        truth: Truth,
    ) -> Tensor:
        """Binary cross-entropy of the masks of objects, each for its own class; its mean over a
        mask's pixels, as a sum over objects."""
        positives = [b[: len(m)] for b, m in zip(boxes, matched, strict=True)]
        logits = self.masks[stage](pool(maps, positives, MASK_SIDE)).float()
        classes = torch.cat([own[: len(m)] for own, m in zip(labels, matched, strict=True)])
        targets = []
        for target, match, own in zip(truth, matched, positives, strict=True):
            if not len(match):
                continue
            rois = torch.cat([match[:, None].to(own), own], dim=1)
            side = 2 * MASK_SIDE
            pixels = roi_align(target["masks"][:, None].to(own), rois, side, 1.0, 0, aligned=True)
            targets.append((pixels[:, 0] >= 0.5).to(own))
        if not len(classes):
            return logits.sum()  # 0, with a gradient for every rank
        picked = logits[torch.arange(len(classes), device=classes.device), classes]
        pixels = picked[0].numel()
        return (
            F.binary_cross_entropy_with_logits(picked, torch.cat(targets), reduction="sum") / pixels
        )

    def detect(
        self, maps: list[Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Of each image `boxes` [n, 4], `labels` [n], `scores` [n] and `masks` [n, 28, 28], those
        as probabilities within the box. Class logits and masks are means over the stages."""
        total, boxes = torch.zeros(()), proposals
        for i, stage in enumerate(STAGES):
            logits, deltas = self.boxes[i](pool(maps, boxes, BOX_SIDE))
            total, every, counts = (
                total.to(logits) + logits,
                torch.cat(boxes),
                [len(b) for b in boxes],
            )
            if i < len(STAGES) - 1:
                by = 1 + logits[:, 1:].argmax(1)
                moved = decode(deltas[torch.arange(len(by)), by], every, stage).split(counts)
                boxes = [clip_boxes_to_image(m, s) for m, s in zip(moved, sizes, strict=True)]
        scores = (total / len(STAGES)).softmax(1)[:, 1:].split(counts)  # [n, K]
        flat = decode(
            deltas[:, 1:].flatten(0, 1), every.repeat_interleave(deltas.shape[1] - 1, 0), stage
        )
        moved = flat.view(len(every), -1, 4).split(counts)
        found = [best(m, s, z) for m, s, z in zip(moved, scores, sizes, strict=True)]
        pooled = pool(maps, [f["boxes"] for f in found], MASK_SIDE)
        classes = torch.cat([f["labels"] for f in found])
        every_mask = torch.stack([head(pooled).float().sigmoid() for head in self.masks]).mean(0)
        masks = every_mask[torch.arange(len(classes)), classes].split(
            [len(f["boxes"]) for f in found]
        )
        return [{**f, "masks": m} for f, m in zip(found, masks, strict=True)]


def over_ranks(count: int, device: torch.device) -> Tensor:
    """The mean count of all ranks, at least 1: losses divided by it do not depend on how images
    are shared among ranks. mmdetection divides by each rank's own."""
    total = torch.tensor(float(count), device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total.clamp(min=1)


def decode(deltas: Tensor, boxes: Tensor, stage: Stage) -> Tensor:
    """Boxes [R, 4] moved by deltas [R, 4]."""
    weights = (1 / stage.center_std,) * 2 + (1 / stage.size_std,) * 2
    return BoxCoder(weights).decode_single(deltas, boxes)


def best(boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """What is left of boxes [n, K, 4] with scores [n, K] after the threshold and a suppression by
    class."""
    rows, classes = (scores > SCORE).nonzero(as_tuple=True)
    boxes, scores = clip_boxes_to_image(boxes[rows, classes], size), scores[rows, classes]
    keep = batched_nms(boxes, scores, classes, NMS)[:DETECTIONS]
    return {"boxes": boxes[keep], "labels": 1 + classes[keep], "scores": scores[keep]}
