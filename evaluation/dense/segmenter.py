"""Segmentation by a backbone: UperNet or a linear head, its loss, and predictions of whole photos.

UperNet (arXiv 1807.10221) and its auxiliary head are transformers' modules with the dropout and the
initial weights that the published training has. In shapes: B images, K classes, H x W pixels.
"""

from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibeton.evaluation.dense.pyramid import Pyramid
from ibeton.evaluation.dense.segmentation_data import IGNORED

DROPOUT, AUXILIARY_WEIGHT, AUXILIARY_WIDTH = 0.1, 0.4, 256
HEADS = ("upernet", "linear")


class Dropout(nn.Module):
    """Dropout of whole channels of [B, C, H, W], drawn for each image from its own generator, so
    that draws do not depend on how processes share a batch."""

    draws: list[torch.Generator]

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = [torch.rand(x.shape[1], 1, 1, generator=own) >= DROPOUT for own in self.draws]
        return x * (torch.stack(kept).to(x) / (1 - DROPOUT))


def upernet_heads(channels: list[int], width: int, classes: int) -> tuple[nn.Module, nn.Module]:
    """The head and the auxiliary head on level 2."""
    from transformers.models.upernet.modeling_upernet import (  # only here: takes seconds
        UperNetFCNHead,
        UperNetHead,
    )

    config: Any = SimpleNamespace(
        pool_scales=(1, 2, 3, 6),
        hidden_size=width,
        num_labels=classes,
        auxiliary_in_channels=None,
        auxiliary_channels=AUXILIARY_WIDTH,
        auxiliary_num_convs=1,
        auxiliary_concat_input=False,
    )
    heads: tuple[Any, Any] = UperNetHead(config, channels), UperNetFCNHead(config, channels)
    for head in heads:
        for module in head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        head.classifier = nn.Sequential(Dropout(), _classifier(head.classifier))
    return heads


def _classifier(layer: nn.Conv2d) -> nn.Module:
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class LinearHead(nn.Module):
    """One 1 x 1 convolution on the four maps, resized to the first and concatenated."""

    def __init__(self, channels: list[int], classes: int) -> None:
        super().__init__()
        self.classifier = _classifier(nn.Conv2d(sum(channels), classes, 1))

    def forward(self, maps: list[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        maps = [m if m.shape[2:] == size else _resized(m, size) for m in maps]
        return self.classifier(torch.cat(maps, dim=1))


def _resized(x: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    return F.interpolate(x, list(size), mode="bilinear", align_corners=False)


class Segmenter(nn.Module):
    """A backbone under a head of HEADS; under "linear" the backbone is frozen. `width` is
    UperNet's (0: the widest map's)."""

    def __init__(self, backbone: nn.Module, classes: int, head: str, width: int = 0) -> None:
        super().__init__()
        linear = head == "linear"
        self.pyramid = Pyramid(backbone, resized=not linear, frozen=linear)
        channels = self.pyramid.channels
        self.auxiliary: nn.Module | None = None
        if linear:
            self.head: nn.Module = LinearHead(channels, classes)
        else:
            self.head, self.auxiliary = upernet_heads(channels, width or max(channels), classes)

    def forward(self, batch: tuple[Tensor, Tensor], draws: list[int]) -> dict[str, Tensor]:
        """Losses of images [B, 3, H, W] with classes int64 [B, H, W]; "loss" is the sum. `draws`
        has a seed for each image."""
        images, labels = batch
        generators = [torch.Generator().manual_seed(draw) for draw in draws]
        for module in self.modules():
            if isinstance(module, Dropout):
                module.draws = generators
        maps = self.pyramid(images)
        losses = {"head": pixel_loss(self.head(maps), labels)}
        if self.auxiliary is not None:
            losses["auxiliary"] = AUXILIARY_WEIGHT * pixel_loss(self.auxiliary(maps), labels)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def predict(self, images: Tensor) -> Tensor:
        """Logits float32 [B, K, H, W] of images [B, 3, H, W]."""
        return _resized(self.head(self.pyramid(images)).float(), images.shape[2:])

    def slide(self, image: Tensor, crop: int, stride: int) -> Tensor:
        """Logits [K, H, W] of an image [3, H, W] of any size: means over windows of `crop` pixels,
        `stride` apart, the last ones flush with the edges (published test)."""
        height, width = image.shape[1:]
        image = F.pad(image, (0, max(0, crop - width), 0, max(0, crop - height)))
        corners = product(*(starts(side, crop, stride) for side in image.shape[1:]))
        total, count = image.new_zeros(()), image.new_zeros(image.shape[1:])
        for top, left in corners:
            place = (..., slice(top, top + crop), slice(left, left + crop))
            logits = self.predict(image[place][None])[0]
            if total.dim() == 0:
                total = logits.new_zeros(len(logits), *image.shape[1:])
            total[place] += logits
            count[place] += 1
        return (total / count)[:, :height, :width]


def starts(side: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along a side of at least `crop` pixels."""
    windows = -(-(side - crop) // stride) + 1
    return [min(i * stride, side - crop) for i in range(windows)]


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, K, h, w], resized to classes [B, H, W]; unlabeled pixels
    count as 0 (published code)."""
    logits = _resized(logits.float(), labels.shape[1:])
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / labels.numel()
