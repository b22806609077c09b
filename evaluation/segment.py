"""Semantic segmentation on ADE20K, or a folder like it: UperNet, or a linear head.

    python -m evaluation.segment --checkpoint CHECKPOINT --data ADEChallengeData2016 \\
        --output-dir runs/ade --head upernet
    torchrun --nproc_per_node 8 -m evaluation.segment ...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ibeton.evaluation.dense.command import run_task
from ibeton.evaluation.dense.config import DenseConfig, parse
from ibeton.evaluation.dense.photos import palette, test_view
from ibeton.evaluation.dense.segmentation_data import (
    IGNORED,
    LabeledPhotos,
    confusion,
    scores,
    training_view,
)
from ibeton.evaluation.dense.segmenter import HEADS, Segmenter
from ibeton.evaluation.dense.task import Place, Scores, Task, load_trunk, watched
from ibeton.evaluation.frozen.features import check_finite
from ibeton.options import option

# head, architecture -> peak learning rate and layer decay; others take ViT-B's (not published)
PUBLISHED = {
    ("upernet", "vit_s"): (3e-5, 0.9),
    ("upernet", "vit_b"): (8e-5, 0.65),
    ("linear", "vit_b"): (8e-4, 1.0),
}


@dataclass
class SegmentConfig(DenseConfig):
    """Segmentation. Defaults are the published ones of ADE20K"""

    head: str = option("upernet", "head; linear leaves the backbone as it is", HEADS)
    head_width: int = option(0, "channels of UperNet (0: those of the backbone)")
    steps: int = option(160_000, "length of the run in steps")
    crop_size: int = option(512, "side of training crops and of test windows, in pixels")
    short_side: int = option(512, "shorter side of a photo in the test, longer one at most 4 x")
    zero_is_class: bool = option(False, "label 0 is a class and 255 unlabeled, unlike ADE20K's")

    def check(self) -> None:
        super().check()
        if self.steps < 1 or self.short_side < 1 or self.head_width < 0:
            raise ValueError("--steps and --short-side must be at least 1, --head-width at least 0")
        if self.crop_size < 32 or self.crop_size % 32:
            raise ValueError(f"--crop-size {self.crop_size} is not a multiple of 32")
        if self.head == "upernet" and self.batch_size < 2:
            raise ValueError("--batch-size 1: UperNet normalizes over the batch; give at least 2")


class Segmentation(Task):
    """The task of a command line. Raises ValueError or FileNotFoundError."""

    def __init__(self, config: SegmentConfig) -> None:
        self.config = config
        self.photos = LabeledPhotos(config.data, "train", config.zero_is_class)
        self.val = LabeledPhotos(config.data, "val", config.zero_is_class)
        self.view = partial(training_view, config.crop_size, config.short_side)
        self.steps = config.steps
        backbone, self.backbone_config = load_trunk(config)
        arch = (config.head, self.backbone_config["arch"])
        lr, decay = PUBLISHED.get(arch, PUBLISHED[config.head, "vit_b"])
        config.lr, config.layer_decay = config.lr or lr, config.layer_decay or decay
        self.model = Segmenter(backbone, len(self.val.classes), config.head, config.head_width)

    def factor(self, step: int) -> float:
        return 1 - step / self.steps  # poly, power 1

    @staticmethod
    def collate(samples: list[Any]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*samples, strict=True)
        return torch.stack(images), torch.stack(labels)

    def predicted(self, index: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Photo uint8 [3, H, W], true and predicted classes [H, W] of a validation photo."""
        photo, truth = self.val.read(index)
        short, crop = self.config.short_side, self.config.crop_size
        image = test_view(photo, short, 4 * short).to(device)
        logits = self.model.slide(image, crop, 2 * crop // 3)
        check_finite(logits)
        said = interpolate(logits[None], list(truth.shape), mode="bilinear")[0].argmax(0)
        return photo, truth, said

    def evaluate(self, place: Place) -> Scores:
        classes, device = len(self.val.classes), place.device
        matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        for index in watched(place, len(self.val)):
            _, truth, said = self.predicted(index, device)
            matrix += confusion(truth.to(device), said, classes, IGNORED)
        parts = place.gathered(matrix.cpu().numpy())
        return scores(sum(parts), self.val.classes) if parts else {}

    def picture(self, index: int, device: torch.device, folder: Path) -> Any:
        """Photo, true and predicted classes; and the prediction alone, as a label map in the
        folder `predictions`."""
        from ibeton.evaluation.pictures.predictions import legend, panels

        classes, colors = [*self.val.classes, "unlabeled"], palette(len(self.val.classes))
        photo, *both = self.predicted(index, device)
        maps = [m.cpu().numpy().clip(max=len(classes) - 1) for m in both]
        figure, axes = panels(photo)
        for axis, classes_of in zip(axes[1:], maps, strict=True):
            axis.imshow(colors[classes_of])
        legend(figure, {classes[i]: colors[i] for i in np.unique(maps)})
        said = Image.fromarray((maps[1] + (not self.config.zero_is_class)).astype(np.uint8))
        (folder / "predictions").mkdir(exist_ok=True)
        said.save(folder / "predictions" / f"{Path(self.val.names[index]).stem}.png")
        return figure


def main(argv: Sequence[str] | None = None) -> int:
    return run_task(parse(SegmentConfig, "segment", __doc__ or "", argv), Segmentation)


if __name__ == "__main__":
    raise SystemExit(main())
