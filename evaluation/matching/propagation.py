"""Labels of a video's first frame carried to the others by the likeness of patches.

As published (DINO's and iBOT's video protocol, after Jabri et al., "Space-time correspondence as a
contrastive random walk", NeurIPS 2020): each patch takes the mean label of its five most similar
patches in the first frame and the seven frames before, among those at most 12 patches away in each
direction, weighted with exp(cosine / 0.1).

In shapes: N = h x w patches of a frame, C channels, K labels (background included), T frames that
are looked back at.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Propagation:
    """The published settings."""

    previous: int = 7  # frames looked back at, besides the first
    radius: int = 12  # patches
    top: int = 5
    temperature: float = 0.1


def neighborhood(rows: int, columns: int, radius: int) -> Tensor:
    """Whether two patches are at most `radius` rows and columns apart: bool [N, N]."""
    place = torch.arange(rows * columns)
    row, column = place // columns, place % columns
    near_rows = (row[:, None] - row).abs() <= radius
    return near_rows & ((column[:, None] - column).abs() <= radius)


def carry(
    target: Tensor,  # [N, C], normalized: patches of the frame that gets labels
    sources: Tensor,  # [T, N, C], normalized: those of the frames that have them
    labels: Tensor,  # [T, N, K]
    near: Tensor,  # bool [N, N]
    how: Propagation,
) -> Tensor:
    """Labels [N, K] of the target's patches."""
    cosines = target @ sources.flatten(0, 1).T  # [N, T * N]
    cosines.masked_fill_(~near.repeat(1, len(sources)), -math.inf)
    best, index = cosines.topk(min(how.top, cosines.shape[1]), dim=1)  # [N, top]
    weights = (best / how.temperature).softmax(dim=1)
    return (weights.unsqueeze(2) * labels.flatten(0, 1)[index]).sum(dim=1)


def propagate(
    frames: Iterable[Tensor],  # patches [N, C] of each frame, the first one's first
    first: Tensor,  # labels of the first frame, one-hot float [N, K]
    grid: tuple[int, int],
    how: Propagation,
) -> Iterator[Tensor]:
    """Labels [N, K] of each frame after the first."""
    remaining = iter(frames)
    start = F.normalize(next(remaining), dim=1)
    first = first.to(start)
    near = neighborhood(*grid, how.radius).to(start.device)
    seen: deque[tuple[Tensor, Tensor]] = deque(maxlen=how.previous)
    for frame in remaining:
        patches = F.normalize(frame, dim=1)
        context = [(start, first), *seen]
        sources, labels = (torch.stack(parts) for parts in zip(*context, strict=True))
        found = carry(patches, sources, labels, near, how)
        seen.append((patches, found))
        yield found


def to_mask(labels: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Labels [N, K] of patches -> label numbers int64 [h * patch, w * patch]: enlarged bilinearly,
    each label stretched to 0 .. 1 (a constant one to 0), the highest one taken."""
    maps = labels.float().T.unflatten(1, grid).unsqueeze(0)  # [1, K, h, w]
    maps = F.interpolate(maps, scale_factor=patch, mode="bilinear", align_corners=False)[0]
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    stretched = (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)
    return stretched.argmax(dim=0)
