"""Object detection and instance segmentation on COCO: Cascade Mask R-CNN.

python -m evaluation.detect --checkpoint CHECKPOINT --data coco --output-dir runs/coco
torchrun --nproc_per_node 8 -m evaluation.detect ...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import resize
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ibeton.evaluation.dense.coco_data import CocoPhotos, Sample, batched, training_view
from ibeton.evaluation.dense.coco_metrics import average_precisions, results, to_photo
from ibeton.evaluation.dense.config import DenseConfig, parse
from ibeton.evaluation.dense.detector import Detector
from ibeton.evaluation.dense.segmentation_data import fitted, normalized, palette
from ibeton.evaluation.dense.task import Place, Scores, Task, load_trunk, spread, watched
from ibeton.evaluation.dense.trainer import run_task
from ibeton.options import option

# architecture -> layer decay; others take ViT-B's (not published)
LAYER_DECAY = {"vit_s": 0.8, "vit_b": 0.75}
LR = 1e-4
DRAWN_SCORE = 0.3  # detections below are not drawn


@dataclass
class DetectConfig(DenseConfig):
    """Detection. Defaults are the published ones of COCO for ViT-S"""

    batch_size: int = option(32, "images per step, over all processes (16 for ViT-B)")
    warmup_steps: int = option(500, "steps of linear warm-up")
    epochs: int = option(12, "length of the run in epochs")
    drops: tuple[int, ...] = option((8, 11), "epochs after which the rate falls to a tenth")
    short_sides: tuple[int, ...] = option(
        tuple(range(480, 801, 32)), "shorter sides in training; the largest one in the test"
    )
    long_side: int = option(1333, "longest side of a photo")
    fpn_width: int = option(256, "channels of FPN and heads")

    def check(self) -> None:
        super().check()
        if self.epochs < 1 or min(self.short_sides) < 32 or self.long_side < max(self.short_sides):
            raise ValueError(
                "--epochs must be at least 1, --short-sides 32 and --long-side the largest of them"
            )


@dataclass(frozen=True)
class TrainingViews:
    """What workers read: the view of a photo, see `training_view`."""

    photos: CocoPhotos
    sides: tuple[int, ...]
    long: int

    def __call__(self, index: int) -> Sample:
        photo, truth = self.photos.photo(index), self.photos.truth(index)
        return training_view(photo, truth, self.sides, self.long)


class Detection(Task):
    """The task of a command line. Raises ValueError or FileNotFoundError."""

    def __init__(self, config: DetectConfig) -> None:
        try:
            import faster_coco_eval  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"detection needs faster-coco-eval ({error}): pip install 'ibeton[dense]'"
            ) from error
        self.config = config
        train = CocoPhotos(config.data, "train", with_objects=True)
        self.val = CocoPhotos(config.data, "val")
        if train.classes != self.val.classes:
            raise ValueError(f"{train.json} and {self.val.json} list different categories")
        self.read, self.names = (
            TrainingViews(train, config.short_sides, config.long_side),
            train.names,
        )
        self.steps = max(1, config.epochs * len(train) // config.batch_size)
        backbone, self.backbone_config = load_trunk(config)
        decay = LAYER_DECAY.get(self.backbone_config["arch"], LAYER_DECAY["vit_b"])
        config.lr, config.layer_decay = config.lr or LR, config.layer_decay or decay
        self.model = Detector(backbone, len(train.classes), config.fpn_width)

    def factor(self, step: int) -> float:
        epoch = step * self.config.batch_size / len(self.names)
        return 0.1 ** sum(epoch >= drop for drop in self.config.drops)

    @staticmethod
    def collate(samples: list[Sample]) -> dict[str, Any]:
        images, sizes = batched([image for image, _ in samples])
        truth = [of for _, of in samples]
        draws = [int(of["draw"]) for of in truth]
        return {"images": images, "sizes": sizes, "truth": truth, "draws": draws}

    def found(self, index: int, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """A validation photo uint8 [3, H, W], and what is found in it, in its pixels."""
        photo, config = self.val.photo(index), self.config
        size = fitted(photo.shape[1], photo.shape[2], max(config.short_sides), config.long_side)
        image = resize(photo, size, antialias=False)
        images, sizes = batched([normalized(image)])
        found = self.model.detect(images.to(device), sizes)[0]
        return photo, to_photo(found, sizes[0], self.val.sizes[index])

    def evaluate(self, place: Place) -> Scores:
        records: list[dict[str, Any]] = []
        for index in watched(place, len(self.val)):
            records += results(self.val, index, self.found(index, place.device)[1])
        if place.world_size > 1:
            parts: list[Any] = [None] * place.world_size
            dist.all_gather_object(parts, records)
            records = [record for part in parts for record in part]
        return average_precisions(self.val, records)

    def draw(self, place: Place, folder: Path) -> None:
        """Photo, true objects and found ones side by side."""
        colors = [tuple(map(int, color)) for color in palette(len(self.val.classes))]
        for index in spread(len(self.val), self.config.pictures):
            photo, found = self.found(index, place.device)
            sure = found["scores"].cpu() >= DRAWN_SCORE
            found = {
                name: found[name].cpu()[sure] for name in ("boxes", "labels", "masks", "scores")
            }
            row = [
                photo,
                *(self._drawn(photo, of, colors) for of in (self.val.truth(index), found)),
            ]
            pixels = np.concatenate([part.permute(1, 2, 0).numpy() for part in row], axis=1)
            Image.fromarray(pixels).save(folder / f"{Path(self.val.names[index]).stem}.png")

    def _drawn(self, photo: Tensor, of: dict[str, Tensor], colors: list[Any]) -> Tensor:
        if not len(of["boxes"]):
            return photo
        own = [colors[label - 1] for label in of["labels"].tolist()]
        names = [self.val.classes[label - 1] for label in of["labels"].tolist()]
        photo = draw_segmentation_masks(photo, of["masks"].bool(), alpha=0.5, colors=own)
        return draw_bounding_boxes(photo, of["boxes"], names, own, width=2)


def main(argv: Sequence[str] | None = None) -> int:
    return run_task(parse(DetectConfig, "detect", __doc__ or "", argv), Detection)


if __name__ == "__main__":
    raise SystemExit(main())
