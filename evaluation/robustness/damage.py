"""What is done to images: patches dropped, at random or by attention, and pieces shuffled.

After Naseer et al., "Intriguing properties of vision transformers" (NeurIPS 2021), whose settings
iBOT's robustness table follows. Images are normalized: a dropped patch, which is 0, has the mean
color. What is drawn for a photo follows from (seed, number of the photo): batches do not matter.

In shapes: B images of S x S pixels, N = h x w patches.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
GRIDS = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (14, 14), (16, 16))  # rows, columns


def random_drops(photos: Sequence[int], patches: int, ratio: float, seed: int) -> Tensor:
    """Which patches of each photo are dropped, ratio * N of them, rounded down: bool [B, N]. With a
    higher ratio the same patches are dropped, and more."""
    count = int(ratio * patches + 1e-6)  # 0.7 * 10 is less than 7
    drops = torch.zeros(len(photos), patches, dtype=torch.bool)
    for row, photo in zip(drops, photos, strict=True):
        order = np.random.default_rng([seed, photo]).permutation(patches)
        row[torch.from_numpy(order[:count])] = True
    return drops


def salient(attention: Tensor, mass: float) -> Tensor:
    """The most attended patches, which have `mass` of all attention: bool [B, N].

    attention [B, N]. As published: from the least attended up, a patch is salient as soon as the
    sum that includes it is above 1 - mass.
    """
    if mass <= 0:
        return torch.zeros_like(attention, dtype=torch.bool)
    shares, order = attention.double().sort(dim=1, stable=True)
    above = (shares / shares.sum(dim=1, keepdim=True)).cumsum(dim=1) > 1 - mass
    return torch.zeros_like(above).scatter_(1, order, above)


def nonsalient(attention: Tensor, mass: float) -> Tensor:
    """The least attended patches, which have `mass` of the attention, or a patch's share less: bool
    [B, N]."""
    return ~salient(attention, 1 - mass)


def drop(images: Tensor, drops: Tensor) -> Tensor:
    """Images [B, 3, S, S] with the patches of `drops` bool [B, N], a square grid, at 0."""
    rows = round(drops.shape[1] ** 0.5)
    side = images.shape[2] // rows
    kept = ~drops.to(images.device).unflatten(1, (rows, rows)).unsqueeze(1)  # [B, 1, h, w]
    return images * kept.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)


def orders(photos: Sequence[int], pieces: int, seed: int) -> Tensor:
    """The piece that comes to each place of each photo: int64 [B, pieces]."""
    drawn = [np.random.default_rng([seed, photo, pieces]).permutation(pieces) for photo in photos]
    return torch.from_numpy(np.stack(drawn))


def shuffle(images: Tensor, grid: tuple[int, int], order: Tensor) -> Tensor:
    """Images [B, 3, S, S] cut into `grid` pieces, put together in `order` int64 [B, rows *
    columns]. Raises ValueError for a grid that does not divide S."""
    rows, columns = grid
    if not fits(images.shape[2], grid):
        raise ValueError(f"a grid of {rows} x {columns} does not divide {images.shape[2]} pixels")
    pieces = images.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # [B, 3, r, p, c, q]
    pieces = pieces.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [B, r * c, 3, p, q]
    where = order.to(images.device)[:, :, None, None, None].expand_as(pieces)
    mixed = pieces.gather(1, where).unflatten(1, (rows, columns))
    return mixed.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def fits(size: int, grid: tuple[int, int]) -> bool:
    return size % grid[0] == 0 and size % grid[1] == 0
