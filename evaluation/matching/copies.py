"""Copy detection on Copydays: mAP of finding the original of a cropped, recompressed or otherwise
changed photo.

    ibeton copies --checkpoint CHECKPOINT --data COPYDAYS

COPYDAYS holds `original/`, and what was made of it in `strong/`, `jpegqual/3/`, `crops/10/` and the
like; files are named as published, 200100.jpg, where all but the last two digits tell the original.
Each photo of each folder searches the originals, and `--distractors` beside them. A photo is seen
squeezed to a square; its feature is the class token and, after it, the generalized mean (power 4)
of the patch tokens. `--whitening` learns from other photos how features scatter, and evens it out.

Only the first 20 photos of a list count, as published.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ibeton.evaluation.command import Scores
from ibeton.evaluation.frozen.features import extract
from ibeton.evaluation.matching.precision import average_precision
from ibeton.evaluation.photos import PhotoSet, square_view
from ibeton.evaluation.tasks import FrozenTask, Subject

DEPTH = 20  # photos of a list that count
VARIANCE = 1e-5  # least variance, as a part of the largest, that whitening divides by


# Photos by folder, `original` first; distractors; those that whitening learns from
Copydays = tuple[dict[str, PhotoSet], PhotoSet | None, PhotoSet | None]


def read_copydays(args: argparse.Namespace, config: dict[str, Any]) -> Copydays:
    """Raises FileNotFoundError or ValueError, naming the folder, for another layout."""
    root: Path = args.data

    def photos(path: Path) -> PhotoSet:
        return PhotoSet(path, args.image_size, view=square_view, labeled=False)

    if not (root / "original").is_dir():
        raise FileNotFoundError(f"--data {root}: {root / 'original'} is missing; give Copydays")
    names = ["original"] + ["strong"] * (root / "strong").is_dir()
    for kind in ("jpegqual", "crops"):
        if (root / kind).is_dir():
            levels = [path.name for path in (root / kind).iterdir() if path.is_dir()]
            names += [f"{kind}/{level}" for level in sorted(levels, key=lambda s: (len(s), s))]
    if len(names) == 1:
        raise FileNotFoundError(f"--data {root} has none of strong, jpegqual/N and crops/N")
    folders = {name: photos(root / name) for name in names}
    originals = groups(folders["original"])
    for name, one in folders.items():
        for index, group in enumerate(groups(one)):
            if group not in originals:
                raise ValueError(f"{root / name / one.name(index)} has no original {group}*")
    distractors = photos(args.distractors) if args.distractors else None
    return folders, distractors, photos(args.whitening) if args.whitening else None


def groups(photos: PhotoSet) -> list[str]:
    """What tells the original of each photo: its name without the last two digits."""
    return [Path(photos.name(i)).stem[:-2] for i in range(len(photos))]


def features_of(photos: PhotoSet, subject: Subject) -> Tensor:
    """Class token and generalized mean of the patches, float32 [n, 2 C]. Raises ValueError for a
    photo that cannot be read."""
    found = extract(subject.backbone, photos, ("cls", "gem"), subject.how)
    if len(found) < len(photos):
        raise ValueError(f"{len(photos) - len(found)} photos of {photos.path} cannot be read")
    return torch.cat([found["cls"], found["gem"]], dim=1)


def whitening(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [C] and matrix [C, C] by which (x - mean) @ matrix has the unit covariance on `features`
    [n, C]. (The published code leaves the mean in the covariance.)"""
    mean = features.mean(dim=0)
    centered = (features - mean).double()
    values, vectors = torch.linalg.eigh(centered.T @ centered / len(features))
    values = values.clamp(min=float(values.max()) * VARIANCE)
    return mean, (vectors / values.sqrt()).float()


def copy_scores(
    queries: Tensor, originals: Tensor, query_groups: Sequence[str], original_groups: Sequence[str]
) -> float:
    """mAP in percent. Features float32 [m, C] and [n, C]; of the n, those after the originals, as
    many as have groups, are distractors."""
    cosines = F.normalize(queries, dim=1) @ F.normalize(originals, dim=1).T
    order = cosines.argsort(dim=1, descending=True, stable=True)[:, :DEPTH].numpy()
    named = np.array([*original_groups, *[""] * (len(originals) - len(original_groups))])
    total = 0.0
    for ranking, group in zip(order, query_groups, strict=True):
        ranks = np.flatnonzero(named[ranking] == group)
        total += average_precision(ranks, int(np.count_nonzero(named == group)))
    return 100 * total / len(queries)


def copies(args: argparse.Namespace, data: Copydays, subject: Subject) -> dict[str, Scores]:
    """mAP of each folder but the originals, and the mean over the levels of crops and JPEG."""
    folders, distractors, others = data
    features = {}
    for name, photos in folders.items():
        print(f"copies: {subject.name}, {name}, {len(photos)} photos", file=sys.stderr)
        features[name] = features_of(photos, subject)
    database = [features["original"]]
    if distractors is not None:
        print(f"copies: {subject.name}, {len(distractors)} distractors", file=sys.stderr)
        database.append(features_of(distractors, subject))
    originals = torch.cat(database)
    if others is not None:
        mean, matrix = whitening(features_of(others, subject))
        originals = (originals - mean) @ matrix
        features = {name: (one - mean) @ matrix for name, one in features.items()}
    known = groups(folders["original"])
    scores = {
        name: copy_scores(features[name], originals, groups(photos), known)
        for name, photos in folders.items()
        if name != "original"
    }
    for kind in ("jpegqual", "crops"):
        levels = [value for name, value in scores.items() if name.startswith(f"{kind}/")]
        if levels:
            scores[f"{kind}_mean"] = float(np.mean(levels))
    return {"copies": scores}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, type=Path, help="folder of Copydays")
    add("--image-size", type=int, help="side of a photo (default: as the model was built for)")
    add("--batch-size", type=int, default=128, help="images at a time")
    add("--distractors", type=Path, help="photos that are no copies, to be searched too")
    add("--whitening", type=Path, help="photos to learn the whitening of features from")


TASK = FrozenTask(
    "copies",
    "Copy detection on Copydays.",
    add_options,
    ("data", "distractors", "whitening", "image_size"),
    read_copydays,
    copies,
    ("strong", "jpegqual_mean", "crops_mean"),
)
main = TASK.main

if __name__ == "__main__":
    raise SystemExit(main())
