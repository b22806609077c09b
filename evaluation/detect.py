"""Object detection and instance segmentation on COCO: Cascade Mask R-CNN.

python -m evaluation.detect --checkpoint CHECKPOINT --data coco --output-dir runs/coco
torchrun --nproc_per_node 8 -m evaluation.detect ...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibeton.evaluation.dense import coco
from ibeton.evaluation.dense.command import run_task
from ibeton.evaluation.dense.config import DenseConfig, parse
from ibeton.evaluation.dense.detector import Batch, Detector
from ibeton.evaluation.dense.photos import palette, test_view
from ibeton.evaluation.dense.task import Place, Scores, Task, load_trunk, watched
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
        if min(self.epochs, self.fpn_width) < 1:
            raise ValueError("--epochs and --fpn-width must be at least 1")
        if min(self.short_sides) < 32 or self.long_side < max(self.short_sides):
            raise ValueError("--short-sides must be at least 32, --long-side the largest of them")


class Detection(Task):
    """The task of a command line. Raises ValueError, FileNotFoundError or ModuleNotFoundError."""

    def __init__(self, config: DetectConfig) -> None:
        self.config = config
        train = coco.CocoPhotos(config.data, "train", with_objects=True)
        self.val = coco.CocoPhotos(config.data, "val")
        if train.classes != self.val.classes:
            raise ValueError(f"{train.json} and {self.val.json} list different categories")
        self.photos = train
        views = coco.published_views(config.short_sides, config.long_side)
        self.view = partial(coco.training_view, views)
        self.steps = max(1, config.epochs * len(train) // config.batch_size)
        backbone, self.backbone_config = load_trunk(config)
        decay = LAYER_DECAY.get(self.backbone_config["arch"], LAYER_DECAY["vit_b"])
        config.lr, config.layer_decay = config.lr or LR, config.layer_decay or decay
        self.model = Detector(backbone, len(train.classes), config.fpn_width)

    def factor(self, step: int) -> float:
        epoch = step * self.config.batch_size / len(self.photos)
        return 0.1 ** sum(epoch >= drop for drop in self.config.drops)

    @staticmethod
    def collate(samples: list[tuple[Tensor, coco.Truth]]) -> Batch:
        images, truth = zip(*samples, strict=True)
        return *coco.batched(list(images)), list(truth)

    def found(self, index: int, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """A validation photo uint8 [3, H, W], and what is found in it, in its pixels."""
        photo, config = self.val.photo(index), self.config
        images, sizes = coco.batched([test_view(photo, max(config.short_sides), config.long_side)])
        found = self.model.detect(images.to(device), sizes)[0]
        return photo, coco.to_photo(found, sizes[0], self.val.sizes[index])

    def evaluate(self, place: Place) -> Scores:
        records: list[dict[str, Any]] = []
        for index in watched(place, len(self.val)):
            records += coco.results(self.val, index, self.found(index, place.device)[1])
        records = [one for part in place.gathered(records) for one in part]
        return coco.average_precisions(self.val, records) if place.rank == 0 else {}

    def picture(self, index: int, device: torch.device, folder: Path) -> Any:
        """Photo, true objects, and those that are found with a score of DRAWN_SCORE or more."""
        from ibeton.evaluation.pictures.predictions import SMALL, objects, panels

        classes, colors = self.val.classes, palette(len(self.val.classes))
        photo, found = self.found(index, device)
        sure = (found["scores"].cpu() >= DRAWN_SCORE).nonzero()[:, 0].flip(0)  # best last
        found = {name: values.cpu()[sure] for name, values in found.items()}
        figure, axes = panels(photo)
        for axis, of in zip(axes[1:], (self.val.truth(index), found), strict=True):
            own = [int(label) - 1 for label in of["labels"]]
            scores = [f" {score:.2f}" for score in of.get("scores", ())] or [""] * len(own)
            texts = [classes[i] + score for i, score in zip(own, scores, strict=True)]
            objects(axis, of["boxes"], of["masks"], texts, [colors[i] for i in own])
        axes[2].set_xlabel(f"{len(sure)} with a score of {DRAWN_SCORE} or more", size=SMALL)
        return figure


def main(argv: Sequence[str] | None = None) -> int:
    return run_task(parse(DetectConfig, "detect", __doc__ or "", argv), Detection)


if __name__ == "__main__":
    raise SystemExit(main())
