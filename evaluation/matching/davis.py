"""Video object segmentation on DAVIS-2017 without training: the masks of each sequence's first
frame, carried on by the backbone's patch tokens, scored with J&F.

    ibeton davis --checkpoint CHECKPOINT --data DAVIS [--masks FOLDER]

DAVIS holds ImageSets/2017/val.txt, JPEGImages/480p/SEQUENCE/00000.jpg and
Annotations/480p/SEQUENCE/00000.png, as published. `--masks` keeps the predicted masks, as palette
PNGs in the layout of Annotations/480p. The scores named `first_mask` are those of a network that
sees nothing: the first frame's masks, repeated.

Frames are 480 pixels high (or wide, if they are upright) and a multiple of 64 along the other side.
J and F are means over all objects of all sequences; the first and last frames do not count.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ibeton.evaluation.command import Scores
from ibeton.evaluation.frozen.features import MEAN, check_finite, evaluating
from ibeton.evaluation.matching.propagation import Propagation, propagate, to_mask
from ibeton.evaluation.matching.video_metrics import mean_scores, object_scores
from ibeton.evaluation.photos import opened, opened_rgb, planes, text_of
from ibeton.evaluation.tasks import FrozenTask, Subject
from ibeton.progress import progress

SHORT_SIDE = 480
LONG_STEP = 64  # the long side is rounded down to a multiple of it
STD = (0.228, 0.224, 0.225)  # this protocol's; everywhere else the first one is 0.229


@dataclass(frozen=True)
class Video:
    """The files of one video; a frame and its mask have the same place."""

    name: str
    frames: list[Path]
    masks: list[Path]


def read_davis(root: Path) -> list[Video]:
    """The sequences of ImageSets/2017/val.txt. Raises FileNotFoundError or ValueError, naming the
    file or folder, for another layout."""
    listing = root / "ImageSets" / "2017" / "val.txt"
    if not listing.is_file():
        raise FileNotFoundError(
            f"--data {root}: {listing} is missing; give the folder of DAVIS-2017"
        )
    names = text_of(listing).split()
    if not names:
        raise ValueError(f"{listing} names no sequence")
    return [_read_video(root, name) for name in names]


def _read_video(root: Path, name: str) -> Video:
    frames, masks = (
        sorted((root / kind / "480p" / name).glob(pattern))
        for kind, pattern in (("JPEGImages", "*.jpg"), ("Annotations", "*.png"))
    )
    if not frames:
        raise FileNotFoundError(f"{root / 'JPEGImages' / '480p' / name} holds no JPEG frames")
    if [path.stem for path in frames] != [path.stem for path in masks]:
        raise ValueError(
            f"sequence {name} has {len(frames)} frames but {len(masks)} masks of the same names in"
            f" {root / 'Annotations' / '480p' / name}; each frame needs one"
        )
    if len(frames) < 3:
        raise ValueError(f"sequence {name} has {len(frames)} frames; J&F needs at least 3")
    if not read_mask(masks[0]).any():
        raise ValueError(f"{masks[0]} marks no object, but the first mask of a sequence must")
    return Video(name, frames, masks)


def read_mask(path: Path) -> np.ndarray:
    """Object numbers uint8 [H, W] of a mask, a palette or gray PNG."""
    image = opened(path)
    if image.mode not in ("P", "L", "1"):
        raise ValueError(
            f"{path} is {image.mode}; a mask is a palette or gray PNG of object numbers"
        )
    return np.array(image.convert("L") if image.mode == "1" else image, dtype=np.uint8)


def frame_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width that a frame is resized to."""
    if height > width:
        return short_side * height // width // LONG_STEP * LONG_STEP, short_side
    return short_side, short_side * width // height // LONG_STEP * LONG_STEP


def read_frame(path: Path, short_side: int) -> tuple[Tensor, tuple[int, int]]:
    """A frame normalized and resized (bilinear, not antialiased), float32 [3, h, w], and the height
    and width that it had."""
    image = planes(opened_rgb(path)).float() / 255
    height, width = image.shape[1:]
    size = frame_size(height, width, short_side)
    image = F.interpolate(image.unsqueeze(0), size, mode="bilinear", align_corners=False)[0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (image - mean) / std, (height, width)


def one_hot(mask: np.ndarray, grid: tuple[int, int]) -> tuple[Tensor, list[int]]:
    """The mask of a first frame, at one pixel a patch (nearest): float [N, K], and the K object
    numbers that its columns stand for, background first."""
    numbers = [0, *sorted(set(np.unique(mask).tolist()) - {0})]
    small = Image.fromarray(mask).resize((grid[1], grid[0]), Image.Resampling.NEAREST)
    labels = torch.from_numpy(np.array(small).flatten().astype(np.int64))
    return torch.stack([labels == number for number in numbers], dim=1).float(), numbers


def segment(sequence: Video, subject: Subject, short_side: int) -> Iterator[np.ndarray]:
    """Predicted object numbers uint8 [H, W] of each frame after the first."""
    patch = subject.config["patch_size"]
    image, (height, width) = read_frame(sequence.frames[0], short_side)
    grid = (image.shape[1] // patch, image.shape[2] // patch)
    mask = read_mask(sequence.masks[0])
    if mask.shape != (height, width):
        raise ValueError(
            f"{sequence.masks[0]} is {mask.shape[1]} x {mask.shape[0]} pixels, its frame {width} x"
            f" {height}"
        )
    labels, numbers = one_hot(mask, grid)
    for found in propagate(_tokens(sequence, subject, short_side), labels, grid, Propagation()):
        columns = to_mask(found, grid, patch).cpu().numpy()
        guess = np.array(numbers, dtype=np.uint8)[columns]
        resized = Image.fromarray(guess).resize((width, height), Image.Resampling.NEAREST)
        yield np.array(resized)


def _tokens(sequence: Video, subject: Subject, short_side: int) -> Iterator[Tensor]:
    """Patch tokens of the last block, float32 [N, C], of each frame."""
    for path in sequence.frames:
        image, _ = read_frame(path, short_side)
        with evaluating(subject.backbone), torch.inference_mode(), subject.how.autocast():
            tokens = subject.backbone(image.unsqueeze(0).to(subject.how.device))
        check_finite(tokens)
        yield tokens[0, 1:].float()


def davis_scores(
    args: argparse.Namespace, sequences: list[Video], subject: Subject
) -> dict[str, Scores]:
    """J&F of the backbone, and of the first mask repeated."""
    objects: list[tuple[float, float]] = []
    still: list[tuple[float, float]] = []
    total = sum(len(sequence.frames) - 1 for sequence in sequences)
    print(f"davis: {subject.name}, {len(sequences)} sequences, {total} frames", file=sys.stderr)
    with progress("davis", total, "frames") as advance:
        for sequence in sequences:
            true = [read_mask(path) for path in sequence.masks]
            guesses = []
            for guess in segment(sequence, subject, args.short_side):
                guesses.append(guess)
                advance(1)
            if args.masks is not None:
                save_masks(args.masks / subject.name, sequence, [true[0], *guesses])
            objects += object_scores(guesses[:-1], true[1:-1]).values()
            still += object_scores([true[0]] * (len(true) - 2), true[1:-1]).values()
    first = {f"first_mask_{name}": value for name, value in mean_scores(still).items()}
    return {"davis": mean_scores(objects) | first}


def save_masks(folder: Path, sequence: Video, masks: list[np.ndarray]) -> None:
    """Write masks as palette PNGs, in the colors of the sequence's own."""
    palette = Image.open(sequence.masks[0]).getpalette()
    (folder / sequence.name).mkdir(parents=True, exist_ok=True)
    for path, mask in zip(sequence.masks, masks, strict=True):
        image = Image.fromarray(mask)
        if palette:
            image.putpalette(palette)
        image.save(folder / sequence.name / path.name)


def read_task(args: argparse.Namespace, config: dict[str, Any]) -> list[Video]:
    patch = config["patch_size"]
    if LONG_STEP % patch:
        raise ValueError(f"davis needs patches that divide {LONG_STEP} pixels, not of {patch}")
    if args.short_side < LONG_STEP or args.short_side % patch:
        raise ValueError(
            f"--short-side {args.short_side}: give a multiple of the patch, {patch} pixels, of at"
            f" least {LONG_STEP}"
        )
    return read_davis(args.data)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, type=Path, help="folder of DAVIS-2017")
    parser.add_argument(
        "--short-side", type=int, default=SHORT_SIDE, help="of a frame in pixels (480: published)"
    )
    parser.add_argument("--masks", type=Path, help="folder to keep the predicted masks in")


TASK = FrozenTask(
    "davis",
    "Video object segmentation on DAVIS-2017 by label propagation.",
    add_options,
    ("data", "short_side"),
    read_task,
    davis_scores,
    ("jf_mean", "j_mean", "f_mean"),
)
main = TASK.main

if __name__ == "__main__":
    raise SystemExit(main())
