"""What the patch tokens' prototypes stand for (iBOT, figure 4): the patches most central to a
prototype, at most one a photo, each with its surroundings.

A patch belongs to the prototype that the loss's target gives it most probably (largest logit after
the center is taken off). It is the more central the further that logit leads over the second one:
the probability itself is 1 bit for bit for many, at the temperatures of a trained teacher.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ibeton.evaluation.frozen.features import check_finite
from ibeton.evaluation.photos import PhotoSet
from ibeton.evaluation.pictures.canvas import new_figure, save, show, to_look_at, views_of
from ibeton.model.head import IBOTHead

ROWS, COLUMNS = 4, 5  # patches of one pattern
SIDE = 5  # patches that a tile shows in each direction
GAP = 4  # pixels between two tiles
TILE_PIXELS = 120
FRAME = (255, 220, 0)


@dataclass(frozen=True)
class Pattern:
    """One prototype, and the patches most central to it."""

    prototype: int
    photos: np.ndarray  # int64 [n], falling lead
    places: np.ndarray  # int64 [n], number of the patch in its photo
    leads: np.ndarray  # float32 [n]
    patches: int  # patches of the whole set that are the prototype's
    seen_in: int  # photos of the whole set that have one


@dataclass(frozen=True)
class Assigned:
    """The prototype of every patch of a set, as the teacher sees it: arrays [n]."""

    photos: np.ndarray  # int64
    places: np.ndarray  # int64
    prototypes: np.ndarray  # int64
    leads: np.ndarray  # float32


def assign(
    batches: Iterable[tuple[np.ndarray, dict[str, np.ndarray]]],  # photos and "patches" [b, N, C]
    head: IBOTHead,
    center: Tensor,  # [K], the patch center of the loss
    device: str,
) -> Assigned:
    """The prototype of every patch, and how far it leads."""
    parts: list[tuple[np.ndarray, ...]] = []
    for indices, found in batches:
        with torch.inference_mode():
            tokens = torch.from_numpy(found["patches"]).to(device)
            bottleneck = head.bottleneck(tokens)
            _, logits = head.prototypes(bottleneck[:, :1], bottleneck)  # [b, N, K]
            check_finite(logits)
            best = (logits - center.to(device)).topk(2, dim=-1)  # [b, N, 2]
        count = tokens.shape[1]
        photos, places = np.repeat(indices, count), np.tile(np.arange(count), len(indices))
        leads = best.values[..., 0] - best.values[..., 1]
        found_here = (best.indices[..., 0].flatten(), leads.flatten())
        parts.append((photos, places, *(one.cpu().numpy() for one in found_here)))
    return Assigned(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def central_patterns(assigned: Assigned, count: int, size: int = ROWS * COLUMNS) -> list[Pattern]:
    """The `count` prototypes whose `size` most central patches, one a photo, lead furthest.

    Raises ValueError where no prototype has patches in so many photos.
    """
    order = np.lexsort((-assigned.leads, assigned.prototypes))
    prototypes, starts = np.unique(assigned.prototypes[order], return_index=True)
    patterns = []
    for prototype, rows in zip(prototypes, np.split(order, starts[1:]), strict=True):
        _, first = np.unique(assigned.photos[rows], return_index=True)
        if len(first) < size:
            continue
        best = rows[np.sort(first)[:size]]
        own = (assigned.photos[best], assigned.places[best], assigned.leads[best])
        patterns.append(Pattern(int(prototype), *own, len(rows), len(first)))
    if not patterns:
        raise ValueError(
            f"none of the {len(prototypes)} prototypes in use has patches in {size} photos:"
            " give more photos"
        )
    patterns.sort(key=lambda pattern: -float(pattern.leads.mean()))
    return patterns[:count]


def tile(view: Tensor, place: int, grid: int) -> np.ndarray:
    """A patch of a view uint8 [3, S, S] of `grid` x `grid` patches, framed, with those about it
    (moved inwards at the view's edge): uint8 [TILE_PIXELS, TILE_PIXELS, 3]."""
    patch, side = view.shape[2] // grid, min(SIDE, grid)
    row, column = divmod(place, grid)
    top, left = (min(max(0, p - side // 2), grid - side) for p in (row, column))
    pixels = view.permute(1, 2, 0).numpy()
    box = [left * patch, top * patch, (left + side) * patch, (top + side) * patch]
    image = Image.fromarray(pixels).crop((box[0], box[1], box[2], box[3]))
    image = image.resize((TILE_PIXELS, TILE_PIXELS), Image.Resampling.BICUBIC)
    scale = TILE_PIXELS / side
    x, y = ((column - left) * scale, (row - top) * scale)
    ImageDraw.Draw(image).rectangle((x, y, x + scale - 1, y + scale - 1), outline=FRAME, width=2)
    return np.asarray(image)


def mosaic(photos: PhotoSet, pattern: Pattern, grid: int) -> np.ndarray:
    """All patches of a pattern, ROWS x COLUMNS tiles, uint8 [H, W, 3]."""
    step = TILE_PIXELS + GAP
    canvas = np.full((ROWS * step - GAP, COLUMNS * step - GAP, 3), 255, np.uint8)
    views = views_of(to_look_at(photos), pattern.photos.tolist())
    for number, (view, place) in enumerate(zip(views, pattern.places.tolist(), strict=True)):
        top, left = number // COLUMNS * step, number % COLUMNS * step
        canvas[top : top + TILE_PIXELS, left : left + TILE_PIXELS] = tile(view, place, grid)
    return canvas


def draw_patterns(photos: PhotoSet, patterns: list[Pattern], grid: int, path: Path) -> None:
    """A panel for each pattern, three in a row; views have `grid` x `grid` patches."""
    columns = min(3, len(patterns))
    rows = -(-len(patterns) // columns)
    figure, axes = new_figure(rows, columns, tile=3.6)
    figure.set_figheight(rows * (3.6 * ROWS / COLUMNS + 0.3) + 0.35)
    for axis, pattern in zip(axes.flat, patterns, strict=False):
        title = (
            f"prototype {pattern.prototype}:"
            f" {pattern.patches:,} patches in {pattern.seen_in:,} photos"
        )
        show(axis, mosaic(photos, pattern, grid).transpose(2, 0, 1), title)
    for axis in axes.flat[len(patterns) :]:
        axis.set_axis_off()
    save(figure, path, "Patches most central to a prototype (framed), with their surroundings")
