"""COCO's photos with boxes and masks, the published views of them, and their batches.

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
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ibeton.evaluation.dense.segmentation_data import fitted, normalized
from ibeton.pipeline.store.decode import UnreadablePhoto, load_photo, to_rgb

DIVISOR = 32  # sides of a batch of images are multiples of it
SMALL_SIDES, CROP_SIDES = (400, 500, 600), (384, 600)  # of the view that is a crop, for 800 pixels
Sample = tuple[Tensor, dict[str, Tensor]]


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
            self.category_ids = sorted(c["id"] for c in self.content["categories"])
            named = {c["id"]: str(c["name"]) for c in self.content["categories"]}
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
                f"{self.json} is not in COCO's format: {error!r} is missing"
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

    def photo(self, index: int) -> Tensor:
        """uint8 [3, H, W]. Raises ValueError or FileNotFoundError that names the file."""
        path = self.folder / self.names[index]
        try:
            image = np.array(to_rgb(load_photo(path.read_bytes())))
        except UnreadablePhoto as reason:
            raise ValueError(f"{path} cannot be read: {reason}") from reason
        if image.shape[:2] != self.sizes[index]:
            raise ValueError(
                f"{path} has {image.shape[1]} x {image.shape[0]} pixels and {self.json} says"
                f" {self.sizes[index][1]} x {self.sizes[index][0]}"
            )
        return torch.from_numpy(image).permute(2, 0, 1)

    def truth(self, index: int) -> dict[str, Tensor]:
        """`boxes` float32 [n, 4], `labels` int64 [n] and `masks` uint8 [n, H, W] of the objects;
        crowds are left out."""
        height, width = self.sizes[index]
        found = [o for o in self.objects[self.ids[index]] if not o["iscrowd"]]
        boxes = torch.tensor([o["bbox"] for o in found], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [self.category_ids.index(o["category_id"]) + 1 for o in found]
        masks = [self._mask(o, height, width) for o in found]
        truth = {
            "boxes": clip_boxes_to_image(boxes, (height, width)),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": torch.from_numpy(np.array(masks, np.uint8).reshape(-1, height, width)),
        }
        return kept(truth)

    def _mask(self, one: dict[str, Any], height: int, width: int) -> np.ndarray:
        from faster_coco_eval import mask

        try:
            parts = mask.frPyObjects(one["segmentation"], height, width)
            return mask.decode(mask.merge(parts) if isinstance(parts, list) else parts)
        except Exception as error:  # of the library's C++, of many kinds
            raise ValueError(f"{self.json}: segmentation of object {one['id']}: {error}") from error


def kept(truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """The objects whose boxes have at least a pixel."""
    boxes = truth["boxes"]
    large = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(dim=1)
    return {name: values[large] for name, values in truth.items()}


def resized(image: Tensor, truth: dict[str, Tensor], short: int, long: int) -> Sample:
    """Image and objects within sides of `short` and `long`."""
    size = fitted(image.shape[1], image.shape[2], short, long)
    scale = torch.tensor([size[1] / image.shape[2], size[0] / image.shape[1]]).repeat(2)
    masks = truth["masks"]
    if len(masks):
        masks = F.resize(masks, size, v2.InterpolationMode.NEAREST)
    else:
        masks = masks.new_zeros(0, *size)
    truth = {"boxes": truth["boxes"] * scale, "labels": truth["labels"], "masks": masks}
    return F.resize(image, size, antialias=False), truth


def cropped(image: Tensor, truth: dict[str, Tensor], least: int, most: int) -> Sample:
    """A random crop with sides of `least` to `most` pixels, less where the image has less."""
    place = []
    for side in image.shape[1:]:
        length = int(torch.randint(min(side, least), min(side, most) + 1, ()))
        place.append((int(torch.randint(side - length + 1, ())), length))
    (top, height), (left, width) = place
    part = (..., slice(top, top + height), slice(left, left + width))
    boxes = truth["boxes"] - torch.tensor([left, top, left, top])
    boxes = clip_boxes_to_image(boxes, (height, width))
    return image[part], kept({**truth, "boxes": boxes, "masks": truth["masks"][part]})


def training_view(
    image: Tensor, truth: dict[str, Tensor], sides: tuple[int, ...], long: int
) -> Sample:
    """The published view: flip, then resize the shorter side to one of `sides`, half of the times
    after a resize and a crop of their own (DETR's, scaled with the largest of `sides`). Image
    float32, normalized. Draws from torch's generator; "draw" is one for the model to use."""
    if torch.rand(()) < 0.5:
        width = image.shape[2]
        left, top, right, bottom = truth["boxes"].unbind(1)
        boxes = torch.stack([width - right, top, width - left, bottom], dim=1)
        image, truth = image.flip(-1), {**truth, "boxes": boxes, "masks": truth["masks"].flip(-1)}
    if torch.rand(()) < 0.5:
        small = [round(side * max(sides) / 800) for side in (*SMALL_SIDES, *CROP_SIDES)]
        image, truth = resized(image, truth, small[int(torch.randint(3, ()))], long)
        image, truth = cropped(image, truth, small[3], small[4])
    image, truth = resized(image, truth, sides[int(torch.randint(len(sides), ()))], long)
    return normalized(image), {**truth, "draw": torch.randint(2**31, ())}


def batched(images: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Images of several sizes as one batch, filled up with zeros right and below, and the sizes."""
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height, width = (-(-max(side) // DIVISOR) * DIVISOR for side in zip(*sizes, strict=True))
    return torch.stack(
        [F.pad(i, [0, 0, width - i.shape[2], height - i.shape[1]]) for i in images]
    ), sizes
