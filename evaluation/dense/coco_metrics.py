"""Detections in COCO's result format, and their average precisions by faster-coco-eval."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from ibeton.evaluation.dense.coco_data import CocoPhotos

KINDS = {"bbox": "box", "segm": "mask"}
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def results(photos: CocoPhotos, index: int, found: dict[str, Tensor]) -> list[dict[str, Any]]:
    """COCO's records of what was found in a photo, boxes and bool masks [n, H, W] in its pixels."""
    from faster_coco_eval import mask

    records = []
    for box, label, score, shape in zip(
        *(found[name].cpu() for name in ("boxes", "labels", "scores", "masks")), strict=True
    ):
        left, top, right, bottom = box.tolist()
        records.append(
            {
                "image_id": photos.ids[index],
                "category_id": photos.category_ids[int(label) - 1],
                "bbox": [left, top, right - left, bottom - top],
                "score": float(score),
                "segmentation": mask.encode(np.asfortranarray(shape.numpy().astype(np.uint8))),
            }
        )
    return records


def average_precisions(photos: CocoPhotos, records: list[dict[str, Any]]) -> dict[str, float]:
    """ "box_ap", "box_ap50", "mask_ap" and so on in percent, NaN where the set has no object of a
    size; all 0 without records."""
    from faster_coco_eval import COCO, COCOeval_faster

    if not records:
        return {f"{kind}_{name}": 0.0 for kind in KINDS.values() for name in NAMES}
    truth = COCO(photos.content)
    scores: dict[str, float] = {}
    for iou_type, kind in KINDS.items():
        evaluation = COCOeval_faster(truth, truth.loadRes(records), iou_type)
        evaluation.params.imgIds = photos.ids
        evaluation.run()
        values = 100 * np.asarray(evaluation.stats[: len(NAMES)])
        values = np.where(values < 0, np.nan, values)  # -1 stands for none
        scores |= {f"{kind}_{n}": float(v) for n, v in zip(NAMES, values, strict=True)}
    return scores


def to_photo(
    found: dict[str, Tensor], scaled: tuple[int, int], size: tuple[int, int]
) -> dict[str, Tensor]:
    """Detections in an image of size `scaled`, in the photo's own pixels and with whole masks."""
    ratio = torch.tensor([size[1] / scaled[1], size[0] / scaled[0]]).repeat(2)
    boxes = found["boxes"].cpu() * ratio
    masks = paste_masks_in_image(found["masks"].cpu()[:, None].float(), boxes.float(), size)[:, 0]
    return {**found, "boxes": boxes, "masks": masks >= 0.5}
