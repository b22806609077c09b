"""What a loader hands to the model."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ibeton.pipeline.compiled import compiled


@dataclass
class Batch:
    """One batch on the training device. B images, V global and L local views, square crops.

    Crops are normalized by the configured mean and standard deviation. Views come first, so that
    `flatten(0, 1)` gives the view-major order in which the published loss wants its logits.
    """

    global_crops: Tensor  # float [V, B, 3, S, S]
    local_crops: Tensor  # float [L, B, 3, s, s]
    masks: Tensor  # bool [V, B, S / patch, S / patch], True = masked for the student; on the CPU
    labels: Tensor  # int64 [B], -1 where the photo has none; on the CPU
    indices: Tensor  # int64 [B], place of the photo in the data set; on the CPU


class BatchPlan(NamedTuple):
    """Which photos a batch is made of, before any of them is read."""

    epoch: int
    indices: np.ndarray  # int64 [B], samples of the data set


@dataclass
class Crops:
    """Finished views of one batch before normalization, on the CPU, sample first.

    The arrays may be slots that the loader reuses: consume them before asking for the next batch.
    """

    global_crops: Tensor  # uint8 [B, V, 3, S, S]
    local_crops: Tensor  # uint8 [B, L, 3, s, s]
    indices: Tensor  # int64 [B]


@dataclass
class DeviceCrops:
    """Finished views of one batch, normalized and on the training device, view first."""

    global_crops: Tensor  # float [V, B, 3, S, S]
    local_crops: Tensor  # float [L, B, 3, s, s]
    indices: Tensor  # int64 [B], on the CPU


@dataclass
class Decoded:
    """Decoded photos of one batch.

    The parts may be slots that the loader reuses: consume them before asking for the next batch.
    """

    parts: list[Tensor]  # uint8 [bytes] each, on any device, of one long row of pixels
    offsets: np.ndarray  # int64 [B]; photo b is [heights[b], widths[b], 3] from that byte on
    heights: np.ndarray  # int64 [B]
    widths: np.ndarray  # int64 [B]
    indices: Tensor  # int64 [B]


@compiled
def _normalize(crops: np.ndarray, scale: np.ndarray, shift: np.ndarray, out: np.ndarray) -> None:
    """`crops` [B, V, 3, S, S] into `out` [V, B, 3, S, S], in one pass where torch needs three."""
    for b in range(crops.shape[0]):
        for v in range(crops.shape[1]):
            for c in range(3):
                source, target = crops[b, v, c].reshape(-1), out[v, b, c].reshape(-1)
                for i in range(source.size):
                    target[i] = np.float32(np.float32(source[i]) * scale[c]) + shift[c]


def normalized(crops: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, V, 3, S, S] -> float32 [V, B, 3, S, S] on the device of `mean`; mean and std are
    float32 [3] on the 0..1 scale. The result is fresh memory, so the input may be reused."""
    scale, shift = 1 / (255 * std), -mean / std
    if mean.device.type == "cpu":
        out = torch.empty(crops.shape[1], crops.shape[0], *crops.shape[2:])
        _normalize(*(t.contiguous().numpy() for t in (crops, scale, shift)), out.numpy())
        return out
    crops = crops.to(mean.device).transpose(0, 1)
    out = torch.empty(crops.shape, dtype=torch.float32, device=mean.device)
    # In one product it takes twice as long.
    return out.copy_(crops).mul_(scale.view(3, 1, 1)).add_(shift.view(3, 1, 1))
