"""COCO's photos with boxes and masks, the published views of them, their batches, and the average
precisions of detections by faster-coco-eval.

    DIR/train2017/*.jpg    DIR/annotations/instances_train2017.json
    DIR/val2017/*.jpg      DIR/annotations/instances_val2017.json

Boxes are (left, top, right, bottom) in pixels. Classes count from 1 in the order of the category
ids; 0 is background.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ibeton.evaluation.dense.photos import read_photo
from ibeton.evaluation.frozen.features import normalized

DIVISOR = 32  # sides of a batch of images are multiples of it
SMALL_SIDES, CROP_SIDES = (400, 500, 600), (384, 600)  # of the view that is a crop, for 800 pixels
KINDS = {"bbox": "box", "segm": "mask"}
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
Truth = dict[str, Tensor]
_LARGE_ENOUGH = v2.SanitizeBoundingBoxes(min_size=1)


class CocoPhotos:
    """The photos of a part ("train" or "val"); `names` are the files'. In training, photos
    without an object are left out.

    Raises FileNotFoundError or ValueError, naming the file, for a data set that is not COCO's.
    """

    def __init__(self, root: str | Path, part: str, with_objects: bool = False) -> None:
        from faster_coco_eval import COCO

        self.folder = Path(root) / f"{part}2017"
        self.json = Path(root) / "annotations" / f"instances_{part}2017.json"
        try:
            self.set = COCO(json.loads(self.json.read_text()))
            self.category_ids = sorted(self.set.cats)
            self.classes = [str(self.set.cats[i]["name"]) for i in self.category_ids]
            for one in self.set.dataset["annotations"]:
                self._check(one)
            images = self.set.dataset["images"]
            if with_objects:
                images = [image for image in images if self._objects(image["id"])]
            self.names, self.ids = [str(i["file_name"]) for i in images], [i["id"] for i in images]
            self.sizes = [(int(i["height"]), int(i["width"])) for i in images]
        except (KeyError, TypeError, AttributeError, AssertionError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{self.json} is not in COCO's format: {what}") from error
        if not self.names:
            raise ValueError(f"{self.json} lists no usable photos")
        there = {path.name for path in self.folder.iterdir()}
        for name in self.names:
            if name not in there and not (self.folder / name).exists():
                raise FileNotFoundError(f"{self.json} lists {self.folder / name}, which is missing")

    def _check(self, one: dict[str, Any]) -> None:
        """Raise ValueError for an object that is of no photo or class, or lacks something."""
        where = f"object {one['id']}"
        for name, listed in (("image_id", self.set.imgs), ("category_id", self.set.cats)):
            if one[name] not in listed:
                raise ValueError(f"{where} has {name} {one[name]}, which is not listed")
        numbers = [*(one.get("bbox") or ()), one.get("area")]
        usable = [isinstance(n, int | float) and -1e9 < n < 1e9 for n in numbers] == [True] * 5
        if not usable or min(numbers[2:]) < 0 or not {"segmentation", "iscrowd"} <= one.keys():
            raise ValueError(f"{where} lacks bbox (four numbers), area, segmentation or iscrowd")

    def _objects(self, image: int) -> list[dict[str, Any]]:
        """The objects of a photo, without crowds."""
        return [one for one in self.set.imgToAnns[image] if not one["iscrowd"]]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> tuple[Tensor, Truth]:
        """`photo` and `truth`."""
        return self.photo(index), self.truth(index)

    def photo(self, index: int) -> Tensor:
        """uint8 [3, H, W]. Raises ValueError or FileNotFoundError that names the file."""
        path, (height, width) = self.folder / self.names[index], self.sizes[index]
        image = read_photo(path)
        if image.shape[1:] != (height, width):
            raise ValueError(
                f"{path} has {image.shape[2]} x {image.shape[1]} pixels and {self.json} says"
                f" {width} x {height}"
            )
        return image

    def truth(self, index: int) -> Truth:
        """`boxes` float32 [n, 4], `labels` int64 [n] and `masks` uint8 [n, H, W] of the objects,
        as torchvision's transforms take them; crowds are left out. Raises ValueError."""
        size, found = self.sizes[index], self._objects(self.ids[index])
        sides = torch.tensor([o["bbox"] for o in found], dtype=torch.float32).view(-1, 4)
        boxes = tv_tensors.BoundingBoxes(sides, format="XYWH", canvas_size=size)  # type: ignore[call-overload]
        boxes = F.clamp_bounding_boxes(F.convert_bounding_box_format(boxes, new_format="XYXY"))
        labels = [self.category_ids.index(o["category_id"]) + 1 for o in found]
        try:
            masks = [self.set.annToMask(o) for o in found]
        except Exception as error:  # of the library's C++, of many kinds
            raise ValueError(f"{self.json}: bad masks of {self.names[index]}: {error}") from error
        if any(mask.shape != size for mask in masks):
            raise ValueError(f"{self.json}: masks of {self.names[index]} differ from it in size")
        stacked = tv_tensors.Mask(np.array(masks, dtype=np.uint8).reshape(-1, *size))
        truth = {"labels": torch.tensor(labels, dtype=torch.int64), "masks": stacked}
        return _LARGE_ENOUGH({"boxes": boxes, **truth})


class RandomSizeCrop(nn.Module):
    """A crop with sides of `least` to `most` pixels, less where the image has less."""

    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self.least, self.most = least, most

    def forward(self, image: Tensor, truth: Truth) -> tuple[Tensor, Truth]:
        ranges = [(min(side, self.least), min(side, self.most) + 1) for side in image.shape[1:]]
        return v2.RandomCrop([int(torch.randint(*both, ())) for both in ranges])(image, truth)


def published_views(sides: tuple[int, ...], long: int) -> v2.Transform:
    """Flip, then resize the shorter side to one of `sides`, half of the times after a resize and a
    crop of their own (DETR's, scaled with the largest of `sides`)."""
    small = [round(side * max(sides) / 800) for side in (*SMALL_SIDES, *CROP_SIDES)]
    crop = v2.Compose([v2.RandomShortestSize(small[:3], long), RandomSizeCrop(*small[3:])])
    resize = v2.RandomShortestSize(list(sides), long)
    return v2.Compose(
        [v2.RandomHorizontalFlip(), v2.RandomApply([crop]), resize, _LARGE_ENOUGH]  # type: ignore[list-item]
    )


def training_view(views: v2.Transform, photo: Tensor, truth: Truth) -> tuple[Tensor, Truth]:
    """A view, normalized, and the objects in it. Draws from torch's generator."""
    image, truth = views(tv_tensors.Image(photo), truth)
    truth = {name: values.as_subclass(Tensor) for name, values in truth.items()}
    return normalized(image.as_subclass(Tensor), "cpu"), truth


def batched(images: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Images of several sizes as one batch, filled up with zeros right and below, and the sizes."""
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height, width = (-(-max(side) // DIVISOR) * DIVISOR for side in zip(*sizes, strict=True))
    padded = [F.pad(i, [0, 0, width - i.shape[2], height - i.shape[1]]) for i in images]
    return torch.stack(padded), sizes


def results(photos: CocoPhotos, index: int, found: dict[str, Tensor]) -> list[dict[str, Any]]:
    """COCO's records of what was found in a photo, boxes and bool masks [n, H, W] in its pixels."""
    from faster_coco_eval import mask

    found = {name: values.cpu() for name, values in found.items()}
    shapes = found["masks"].to(torch.uint8).permute(1, 2, 0).numpy()
    values = {
        "bbox": box_convert(found["boxes"], "xyxy", "xywh").tolist(),
        "category_id": [photos.category_ids[label - 1] for label in found["labels"].tolist()],
        "score": found["scores"].tolist(),
        "segmentation": mask.encode(np.asfortranarray(shapes)),
    }
    each = zip(*values.values(), strict=True)
    return [{"image_id": photos.ids[index], **dict(zip(values, one, strict=True))} for one in each]


def average_precisions(photos: CocoPhotos, records: list[dict[str, Any]]) -> dict[str, float]:
    """ "box_ap", "box_ap50", "mask_ap" and so on in percent, without those of a size that no object
    of the set has."""
    from faster_coco_eval import COCOeval_faster

    scores: dict[str, float] = {}
    for iou_type, kind in KINDS.items():
        if iou_type == "segm":  # with a box, the size of a detection would be the box's
            records = [{k: v for k, v in one.items() if k != "bbox"} for one in records]
        evaluation = COCOeval_faster(photos.set, photos.set.loadRes(records), iou_type)
        evaluation.params.imgIds = photos.ids
        evaluation.run()
        values = 100 * np.asarray(evaluation.stats[: len(NAMES)])
        named = zip(NAMES, values, strict=True)
        scores |= {f"{kind}_{n}": float(v) for n, v in named if v >= 0}  # below: no object
    return scores


def to_photo(
    found: dict[str, Tensor], scaled: tuple[int, int], size: tuple[int, int]
) -> dict[str, Tensor]:
    """Detections in an image of size `scaled`, in the photo's own pixels and with whole masks."""
    boxes = resize_boxes(found["boxes"].cpu(), list(scaled), list(size))
    masks = paste_masks_in_image(found["masks"].cpu(), boxes, size)[:, 0]
    return {**found, "boxes": boxes, "masks": masks >= 0.5}
