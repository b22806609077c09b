"""Accuracy over how much of the images is dropped or shuffled, and its picture."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ibeton.evaluation.command import Scores
from ibeton.evaluation.frozen.features import (
    Extraction,
    check_read,
    class_attention,
    image_batches,
)
from ibeton.evaluation.photos import PhotoSet
from ibeton.evaluation.robustness import damage
from ibeton.evaluation.robustness.accuracy import logits_of
from ibeton.evaluation.robustness.damage import GRIDS, RATIOS
from ibeton.progress import progress


@dataclass(frozen=True)
class Saliency:
    """Whose attention says which patches are salient."""

    backbone: nn.Module
    head: int | None = None  # None: the mean of all heads

    def attention(self, images: Tensor) -> Tensor:
        """Normalized images [B, 3, S, S] -> what the class token pays each patch, float [B, N]."""
        heads = class_attention(self.backbone, images)
        return heads.mean(dim=1) if self.head is None else heads[:, self.head]


@dataclass
class Tally:
    """Photos that were classified right, by what was done to them, and patches dropped."""

    right: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, float] = field(default_factory=dict)  # sums of shares
    read: int = 0

    def add(self, name: str, right: Tensor, drops: Tensor | None = None) -> None:
        self.right[name] = self.right.get(name, 0) + int(right.sum())
        if drops is not None:
            share = float(drops.float().mean(dim=1).sum())
            self.dropped[name] = self.dropped.get(name, 0.0) + share


def measure(
    model: nn.Module,
    saliency: Saliency | None,  # None: random drops only
    photos: PhotoSet,
    patch_size: int,
    how: Extraction,
    seed: int = 0,
) -> Tally:
    """Classify each photo as it is and damaged in all ways, which a decoded photo goes through
    together. Unreadable photos are named and left out. Raises ValueError if none can be read, or if
    logits or attention are not finite."""
    tally = Tally()
    modules = [model] if saliency is None else [model, saliency.backbone]
    with (
        progress("damage", len(photos)) as advance,
        closing(image_batches(photos, np.arange(len(photos)), how, modules)) as batches,
    ):
        for batch, images in batches:
            labels = torch.from_numpy(photos.labels[batch.indices]).to(how.device)
            with torch.inference_mode(), how.autocast():
                attention = None if saliency is None else saliency.attention(images)
                numbers = batch.indices.tolist()
                for name, x, drops in damaged(images, numbers, patch_size, attention, seed):
                    tally.add(name, logits_of(model, x, how).argmax(dim=1) == labels, drops)
            tally.read += len(batch.indices)
            advance(len(batch.indices) + len(batch.unreadable))
    check_read(photos, tally.read)
    return tally


def damaged(
    images: Tensor, photos: list[int], patch_size: int, attention: Tensor | None, seed: int
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Images [B, 3, S, S] as they are, then damaged in each way: its name, the images, and which
    patches were dropped, if any, bool [B, N]. `attention` [B, N]: None for random drops only."""
    size = images.shape[2]
    yield "clean", images, None
    for ratio in RATIOS:
        drops = {"random": damage.random_drops(photos, (size // patch_size) ** 2, ratio, seed)}
        if attention is not None:
            drops["salient"] = damage.salient(attention, ratio)
            drops["nonsalient"] = damage.nonsalient(attention, ratio)
        for kind, chosen in drops.items():
            yield f"{kind}_{ratio}", damage.drop(images, chosen), chosen
    for rows, columns in GRIDS:
        if damage.fits(size, (rows, columns)):
            order = damage.orders(photos, rows * columns, seed)
            yield f"shuffle_{rows}x{columns}", damage.shuffle(images, (rows, columns), order), None


def curve_scores(tally: Tally) -> dict[str, Scores]:
    """Top-1 in percent by what was done; for drops also the share of patches in percent."""
    accuracy = {name: 100 * right / tally.read for name, right in tally.right.items()}
    occlusion: Scores = {"clean": accuracy["clean"]}
    for name, total in tally.dropped.items():
        occlusion[name] = accuracy[name]
        occlusion[f"{name}_dropped"] = 100 * total / tally.read
    shuffled: Scores = {"clean": accuracy["clean"]}
    shuffled |= {k.removeprefix("shuffle_"): v for k, v in accuracy.items() if "shuffle" in k}
    return {"occlusion": occlusion, "shuffle": shuffled}


def draw_curves(scores: dict[str, Scores], path: Path, title: str) -> None:
    """A PNG: top-1 over the share of dropped patches, and over the number of shuffled pieces."""
    from ibeton.evaluation.pictures.canvas import INK, plt, save

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    occlusion, shuffled = scores["occlusion"], scores["shuffle"]
    for kind in ("random", "salient", "nonsalient"):
        names = [f"{kind}_{ratio}" for ratio in RATIOS if f"{kind}_{ratio}" in occlusion]
        if names:
            shares = [0.0, *(occlusion[f"{name}_dropped"] for name in names)]
            values = [occlusion["clean"], *(occlusion[name] for name in names)]
            axes[0].plot(shares, values, marker="o", markersize=3.5, label=kind)
    axes[0].set_xlabel("patches dropped, %")
    axes[0].legend(frameon=False)
    names = ["1x1", *(name for name in shuffled if name != "clean")]
    axes[1].plot(names, [shuffled["clean"], *(shuffled[n] for n in names[1:])], marker="o")
    axes[1].set_xlabel("pieces shuffled, rows x columns")
    for axis in axes:
        axis.set_ylabel("top-1, %")
        axis.set_ylim(0, None)
        axis.grid(alpha=0.3)
        axis.tick_params(colors=INK, labelsize=8)
    save(figure, path, title)
