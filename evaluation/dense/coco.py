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
from torch import Tensor
from torchvision import tv_tensors
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ibeton.evaluation.dense.photos import normalized, read_photo

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
        self.folder = Path(root) / f"{part}2017"
        self.json = Path(root) / "annotations" / f"instances_{part}2017.json"
        for path in (self.folder, self.json):
            if not path.exists():
                raise FileNotFoundError(f"--data {root}: {path} is missing")
        try:
            self.content = json.loads(self.json.read_text())
            images = self.content["images"]
            named = {c["id"]: str(c["name"]) for c in self.content["categories"]}
            self.category_ids = sorted(named)
            self.objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in images}
            for one in self.content["annotations"]:
                self._check(one, named)
                self.objects[one["image_id"]].append(one)
            if with_objects:
                images = [i for i in images if any(not o["iscrowd"] for o in self.objects[i["id"]])]
            self.names, self.ids = [i["file_name"] for i in images], [i["id"] for i in images]
            self.sizes = [(int(i["height"]), int(i["width"])) for i in images]
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.json} is not JSON ({error})") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.json} is not in COCO's format: {error} is missing or of another type"
            ) from error
        if not self.names:
            raise ValueError(
                f"{self.json} lists no photos{' with objects' if with_objects else ''}"
            )
        self.classes = [named[i] for i in self.category_ids]

    def _check(self, one: dict[str, Any], named: dict[int, str]) -> None:
        where = f"{self.json}: object {one['id']}"
        if one["image_id"] not in self.objects:
            raise ValueError(f"{where} is of image {one['image_id']}, which is not listed")
        if one["category_id"] not in named:
            raise ValueError(f"{where} has category {one['category_id']}, which is not listed")
        if len(one["bbox"]) != 4 or "segmentation" not in one or "iscrowd" not in one:
            raise ValueError(f"{where} needs a bbox of four numbers, segmentation and iscrowd")

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
        as torchvision's transforms take them; crowds are left out."""
        size = self.sizes[index]
        found = [o for o in self.objects[self.ids[index]] if not o["iscrowd"]]
        sides = torch.tensor([o["bbox"] for o in found], dtype=torch.float32).view(-1, 4)
        boxes = tv_tensors.BoundingBoxes(sides, format="XYWH", canvas_size=size)  # type: ignore[call-overload]
        boxes = F.convert_bounding_box_format(boxes, new_format="XYXY")
        labels = [self.category_ids.index(o["category_id"]) + 1 for o in found]
        masks = torch.stack([self._mask(o, size) for o in found] or [torch.zeros(0)])
        return _LARGE_ENOUGH(
            {
                "boxes": F.clamp_bounding_boxes(boxes),
                "labels": torch.tensor(labels, dtype=torch.int64),
                "masks": tv_tensors.Mask(masks.view(-1, *size), dtype=torch.uint8),
            }
        )

    def _mask(self, one: dict[str, Any], size: tuple[int, int]) -> Tensor:
        from faster_coco_eval import mask

        try:
            parts = mask.frPyObjects(one["segmentation"], *size)
            whole = mask.merge(parts) if isinstance(parts, list) else parts
            return torch.from_numpy(mask.decode(whole))
        except Exception as error:  # of the library's C++, of many kinds
            raise ValueError(f"{self.json}: segmentation of object {one['id']}: {error}") from error


class RandomSizeCrop(v2.Transform):
    """A crop with sides of `least` to `most` pixels, less where the image has less."""

    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self.least, self.most = least, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        place = []
        for side in v2.query_size(flat_inputs):
            length = int(torch.randint(min(side, self.least), min(side, self.most) + 1, ()))
            place.append((int(torch.randint(side - length + 1, ())), length))
        (top, height), (left, width) = place
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        return F.crop(inpt, **params)


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
    """A view, normalized, and the objects in it. Draws from torch's generator; "draw" is one for
    the model to use."""
    image, truth = views(tv_tensors.Image(photo), truth)
    truth = {name: values.as_subclass(Tensor) for name, values in truth.items()}
    return normalized(image.as_subclass(Tensor)), {**truth, "draw": torch.randint(2**31, ())}


def batched(images: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Images of several sizes as one batch, filled up with zeros right and below, and the sizes."""
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height, width = (-(-max(side) // DIVISOR) * DIVISOR for side in zip(*sizes, strict=True))
    padded = [F.pad(i, [0, 0, width - i.shape[2], height - i.shape[1]]) for i in images]
    return torch.stack(padded), sizes


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
