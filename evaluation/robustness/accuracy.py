"""Top-1 of a classifier on variants of ImageNet: -A, -R, -C and the backgrounds challenge."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ibeton.evaluation.command import Scores
from ibeton.evaluation.frozen.features import (
    Extraction,
    check_finite,
    check_read,
    image_batches,
)
from ibeton.evaluation.photos import PhotoSet, View, bilinear_view, center_view, some
from ibeton.evaluation.robustness.classifier import imagenet_variant, imagenet_wnids
from ibeton.progress import progress

SEVERITIES = ("1", "2", "3", "4", "5")
# AlexNet's error on each corruption, mean of the severities (Hendrycks and Dietterich,
# "Benchmarking neural network robustness", ICLR 2019).
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
IN9_CLASSES = 9
IN9_MASKS = "fg_mask"  # the folder of masks beside the variants


def top1(
    model: nn.Module,
    photos: PhotoSet,
    how: Extraction,
    name: str,
    candidates: list[int] | None = None,
    mapped: np.ndarray | None = None,
) -> float:
    """Top-1 in percent. `candidates`: choose among these classes alone. `mapped` int64 [K]: hold
    this number of the chosen class against the label. Unreadable photos are named and left out.
    Raises ValueError if none can be read, or if logits are not finite."""
    columns = None if candidates is None else torch.tensor(candidates)
    right = read = 0
    with (
        progress(name, len(photos)) as advance,
        closing(image_batches(photos, np.arange(len(photos)), how, [model])) as batches,
    ):
        for batch, images in batches:
            chosen = choose(logits_of(model, images, how), columns).cpu().numpy()
            chosen = chosen if mapped is None else mapped[chosen]
            right += int((chosen == photos.labels[batch.indices]).sum())
            read += len(batch.indices)
            advance(len(batch.indices) + len(batch.unreadable))
    check_read(photos, read)
    return 100 * right / read


def logits_of(model: nn.Module, images: Tensor, how: Extraction) -> Tensor:
    """Logits float32 [B, K] of normalized images [B, 3, S, S]. Raises ValueError as
    `check_finite`."""
    with torch.inference_mode(), how.autocast():
        logits = model(images).float()
    check_finite(logits)
    return logits


def choose(logits: Tensor, columns: Tensor | None) -> Tensor:
    """The class with the highest of logits [B, K], among `columns` int64 alone: int64 [B]."""
    if columns is None:
        return logits.argmax(dim=1)
    columns = columns.to(logits.device)
    return columns[logits[:, columns].argmax(dim=1)]


def read_variant(
    name: str, path: Path, size: int, classes: list[str], view: View = bilinear_view
) -> tuple[PhotoSet, list[int]]:
    """The photos of ImageNet-"a" or "r", and the classes to choose from: the 200 of that set for a
    classifier of ImageNet, else those that the set has photos of. Raises ValueError for a set of
    ImageNet's classes that lacks some of the 200, or has others."""
    photos = PhotoSet(path, size, classes, view)
    if classes != imagenet_wnids():
        return photos, sorted(set(photos.labels.tolist()))
    own, expected = set(photos.photos.classes), imagenet_variant(name)
    if missing := sorted(set(expected) - own):
        raise ValueError(
            f"{path} lacks {len(missing)} of ImageNet-{name.upper()}'s 200 classes"
            f" ({some(missing)})"
        )
    if others := sorted(own - set(expected)):
        raise ValueError(f"{path} has {others[0]}, which ImageNet-{name.upper()} lacks")
    return photos, [classes.index(wnid) for wnid in expected]


def read_corruptions(root: Path, size: int, classes: list[str]) -> dict[str, dict[str, PhotoSet]]:
    """{corruption: {severity: photos}}. Raises FileNotFoundError or ValueError, naming the folder,
    for another layout."""
    if not root.is_dir():
        raise FileNotFoundError(f"--imagenet-c {root} is no folder")
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    if not names:
        raise ValueError(f"--imagenet-c {root} holds no folders of corruptions")
    sets: dict[str, dict[str, PhotoSet]] = {}
    for name in names:
        for severity in SEVERITIES:
            path = root / name / severity
            if not path.is_dir():
                raise FileNotFoundError(
                    f"--imagenet-c {root}: {path} is missing; put the folders of all corruptions,"
                    " each with 1 to 5, into one"
                )
            photos = PhotoSet(path, size, classes, center_view)
            sets.setdefault(name, {})[severity] = photos
    return sets


def corruption_scores(errors: dict[str, list[float]]) -> Scores:
    """Errors in percent, by corruption and severity -> each corruption's mean; `mean_error`, their
    plain mean, as published; and `mce`, where all 15 standard corruptions are there: the mean of
    each one's error over AlexNet's."""
    means = {name: float(np.mean(values)) for name, values in errors.items()}
    scores = {f"{name}_error": value for name, value in means.items()}
    scores["mean_error"] = float(np.mean(list(means.values())))
    if set(ALEXNET) <= set(means):
        scores["mce"] = float(np.mean([means[name] / error for name, error in ALEXNET.items()]))
    return scores


def read_backgrounds(root: Path, size: int) -> dict[str, PhotoSet]:
    """{variant: photos} of the backgrounds challenge. Raises FileNotFoundError or ValueError,
    naming the folder, for another layout."""
    found = sorted(
        path.parent
        for path in root.glob("*/val")
        if path.is_dir() and path.parent.name != IN9_MASKS
    )
    if not found:
        raise FileNotFoundError(f"--in9 {root} has no folders VARIANT/val/00_dog, 01_bird, ...")
    sets = {}
    for folder in found:
        photos = PhotoSet(folder / "val", size, view=center_view)
        if [name[:2] for name in photos.classes] != [f"{i:02d}" for i in range(IN9_CLASSES)]:
            raise ValueError(
                f"{folder / 'val'} has the classes {', '.join(photos.classes[:3])}, ...;"
                " IN-9 has nine, 00_dog to 08_..."
            )
        sets[folder.name] = photos
    return sets


def read_in9_map(path: Path, num_classes: int) -> np.ndarray:
    """The number 0 .. 8 in IN-9 of each of the classifier's classes, int64 [K], -1 for none, from
    {"class number": number}. Raises ValueError for anything else."""
    try:
        content = json.loads(path.read_text())
        pairs = {int(key): int(value) for key, value in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--in9-map {path} is no JSON object of numbers ({error})") from error
    numbers = np.full(num_classes, -1)
    for key, value in pairs.items():
        if not (0 <= key < num_classes and -1 <= value < IN9_CLASSES):
            raise ValueError(
                f"--in9-map {path} maps {key} to {value}; the classifier has classes 0 to"
                f" {num_classes - 1}, IN-9 has 0 to {IN9_CLASSES - 1}, and -1 is none"
            )
        numbers[key] = value
    if not set(range(IN9_CLASSES)) <= set(numbers.tolist()):
        raise ValueError(f"--in9-map {path} maps no class to some of the classes of IN-9")
    return numbers


def background_scores(accuracies: dict[str, float]) -> Scores:
    """Top-1 of each variant, and the gap that backgrounds of other classes make."""
    scores = dict(accuracies)
    if {"mixed_same", "mixed_rand"} <= set(scores):
        scores["bg_gap"] = scores["mixed_same"] - scores["mixed_rand"]
    return scores
