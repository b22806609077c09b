"""What all exports do: the program that an export is for loads it, and must compute the same
features as our backbone, before the file gets its name.

timm and transformers resize the position table of a ViT by other rules, which change features by
much more than rounding. Here the published rule is applied once, for one image size: an export is
for that size, and exact there.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5  # of the largest feature


def check_features(
    library: str,
    backbone: nn.Module,
    theirs: Callable[[Tensor], Tensor],
    side: int,
) -> None:
    """Raise ValueError unless both compute the same tokens for the same images."""
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, given = backbone(images), theirs(images)
    error = float((given - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        raise ValueError(
            f"the model in {library} gives other features at {side} pixels (off by {error:.1e} of"
            f" the largest, {TOLERANCE:g} allowed); not written. Swins agree where windows tile"
            " every map, as at 224 and 448"
        )


def check_side(side: int, patch: int) -> None:
    """Raise ValueError for an image that patches do not tile."""
    if side < patch or side % patch:
        raise ValueError(f"--image-size {side} is not a multiple of the patch size, {patch}")


def refuse_existing(target: Path) -> None:
    """Raise FileExistsError if it exists, FileNotFoundError if its folder does not."""
    if target.exists():
        raise FileExistsError(f"{target} exists: remove it, or give another name")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is no folder: make it, or give another name")
