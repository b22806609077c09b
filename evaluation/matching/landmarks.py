"""Landmark retrieval on revisited Oxford and Paris: mAP of the medium and hard protocols.

    ibeton retrieve --checkpoint CHECKPOINT --data FOLDER

FOLDER is roxford5k or rparis6k, as published: `jpg/NAME.jpg` and `gnd_roxford5k.pkl` (any one
`gnd_*.pkl`). The feature of a photo is the class token, averaged over the photo at 512 pixels and
at 1 / sqrt 2 and 1 / 2 of it; queries are whole photos. Medium: easy and hard photos are to be
found; hard: the hard ones, and easy ones are taken out of the list, as junk is.

The published ground truth is a pickle: nothing in it is executed.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ibeton.evaluation.command import Scores
from ibeton.evaluation.frozen.features import check_finite, evaluating, normalized
from ibeton.evaluation.matching.precision import average_precision, precision_at, ranks_without_junk
from ibeton.evaluation.photos import opened_rgb, planes
from ibeton.evaluation.plain_pickle import read_pickle
from ibeton.evaluation.tasks import FrozenTask, Subject
from ibeton.progress import progress
from ibeton.workers import cores, in_threads

SIDE = 512  # the longer side of a photo in pixels
SCALES = (1.0, 1 / math.sqrt(2), 0.5)
KS = (1, 5, 10)
_AHEAD = 16  # photos that are being decoded, or ready


@dataclass(frozen=True)
class Query:
    """What one query is to find: numbers of photos."""

    easy: list[int]
    hard: list[int]
    junk: list[int]


@dataclass(frozen=True)
class Landmarks:
    """A set of landmark photos with its queries."""

    name: str  # roxford5k or rparis6k
    photos: list[Path]
    query_photos: list[Path]
    queries: list[Query]


def read_landmarks(root: Path) -> Landmarks:
    """Photos and queries of a folder of revisited Oxford or Paris. Raises FileNotFoundError or
    ValueError, naming the file, for another layout."""
    truths = sorted(root.glob("gnd_*.pkl"))
    if len(truths) != 1:
        raise FileNotFoundError(
            f"--data {root} has {len(truths)} files gnd_*.pkl; give roxford5k or rparis6k, with one"
        )
    content = read_pickle(truths[0], "ground truth")
    try:
        names, query_names = list(content["imlist"]), list(content["qimlist"])
        queries = [
            Query(*([int(i) for i in truth[kind]] for kind in ("easy", "hard", "junk")))
            for truth in content["gnd"]
        ]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{truths[0]} lacks imlist, qimlist, or gnd with easy, hard and junk ({error!r})"
        ) from error
    if not names or len(queries) != len(query_names):
        raise ValueError(
            f"{truths[0]} has {len(names)} photos, {len(query_names)} queries and ground truth of"
            f" {len(queries)}; each query needs its own"
        )
    last = max((i for q in queries for i in (*q.easy, *q.hard, *q.junk)), default=0)
    if last >= len(names):
        raise ValueError(f"{truths[0]} refers to photo {last}, and has {len(names)}")
    photos, query_photos = (
        [root / "jpg" / f"{name}.jpg" for name in group] for group in (names, query_names)
    )
    missing = [path for path in (*photos, *query_photos) if not path.is_file()]
    if missing:
        others = f", and {len(missing) - 1} more photos are" if len(missing) > 1 else " is"
        raise FileNotFoundError(f"{missing[0]}{others} missing")
    return Landmarks(truths[0].stem.removeprefix("gnd_"), photos, query_photos, queries)


def read_photo(path: Path) -> Tensor:
    """A photo, at most 512 pixels on either side, uint8 [3, h, w]. Raises ValueError for one that
    cannot be read: ground truth goes by number, so none may be left out."""
    image = opened_rgb(path)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return planes(image)


def multiscale_feature(image: Tensor, subject: Subject) -> Tensor:
    """The mean class token of a photo uint8 [3, h, w] over all scales, normalized, float32 [C].
    What does not fill a patch at the right and lower edge is left out, as a convolution does."""
    patch = subject.config["patch_size"]
    pixels = normalized(image.unsqueeze(0), subject.how.device)
    total = torch.zeros((), device=pixels.device)
    with evaluating(subject.backbone), torch.inference_mode(), subject.how.autocast():
        for scale in SCALES:
            scaled = pixels
            if scale != 1:
                scaled = F.interpolate(
                    pixels, scale_factor=scale, mode="bilinear", align_corners=False
                )
            height, width = (max(patch, side // patch * patch) for side in scaled.shape[2:])
            if height > scaled.shape[2] or width > scaled.shape[3]:
                raise ValueError(
                    f"a photo of {image.shape[2]} x {image.shape[1]} pixels has no whole patch of"
                    f" {patch} at scale {scale:.2f}"
                )
            total = total + subject.backbone(scaled[:, :, :height, :width])[0, 0].float()
    check_finite(total)
    return F.normalize(total, dim=0)


def landmark_scores(
    order: np.ndarray,  # int64 [q, n]: photos by falling similarity
    queries: Sequence[Query],
) -> Scores:
    """mAP and mean precision at 1, 5 and 10 in percent of the medium and hard protocols. A query
    without a photo to find is left out of the mean."""
    scores: Scores = {}
    for name in ("medium", "hard"):
        rows = []
        for ranking, query in zip(order, queries, strict=True):
            medium = name == "medium"
            positives = {*query.hard, *(query.easy if medium else ())}
            junk = {*query.junk, *(() if medium else query.easy)}
            if positives:
                ranks = ranks_without_junk(ranking, positives, junk)
                average = average_precision(ranks, len(positives))
                rows.append((average, *(precision_at(ranks, k) for k in KS)))
        if not rows:
            raise ValueError(f"no query has a photo to find in the {name} protocol")
        means = 100 * np.mean(rows, axis=0)
        names = (f"{name}_map", *(f"{name}_precision_at_{k}" for k in KS))
        scores |= zip(names, means.tolist(), strict=True)
    return scores


def retrieve(args: argparse.Namespace, data: Landmarks, subject: Subject) -> dict[str, Scores]:
    paths = [*data.query_photos, *data.photos]
    print(f"retrieve: {subject.name}, {len(paths)} photos", file=sys.stderr)
    features = []
    threads = subject.how.threads or cores()
    with (
        progress("retrieve", len(paths)) as advance,
        closing(in_threads(read_photo, paths, threads, _AHEAD)) as images,
    ):
        for image in images:
            features.append(multiscale_feature(image, subject).cpu())
            advance(1)
    queries, photos = torch.stack(features).split([len(data.query_photos), len(data.photos)])
    order = (queries @ photos.T).argsort(dim=1, descending=True, stable=True)
    return {data.name: landmark_scores(order.numpy(), data.queries)}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, type=Path, help="folder roxford5k or rparis6k")


TASK = FrozenTask(
    "retrieve",
    "Landmark retrieval on revisited Oxford and Paris.",
    add_options,
    ("data",),
    lambda args, config: read_landmarks(args.data),
    retrieve,
    ("medium_map", "hard_map"),
)
main = TASK.main

if __name__ == "__main__":
    raise SystemExit(main())
