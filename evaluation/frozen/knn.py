"""Weighted k-NN on frozen features: the quickest figure of merit of a backbone.

As published (after Wu et al., "Unsupervised feature learning via non-parametric instance
discrimination", CVPR 2018): cosine similarity, the k nearest training photos vote for their class
with exp(similarity / temperature).

    ibeton knn --checkpoint CHECKPOINT --train FOLDER_OR_BETON --val FOLDER_OR_BETON
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibeton.evaluation.command import Protocol, Scores, Task
from ibeton.evaluation.frozen.features import Extraction, Features, check_finite, extract
from ibeton.evaluation.photos import PhotoSet

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
TRAIN_CHUNK, TEST_CHUNK = 16_384, 64  # similarities at a time: 4 MiB, which a CPU's cache holds
PIXELS = 32  # side of the images whose raw pixels are compared
VOTES = 1 << 22  # votes at a time, photos x classes: 32 MiB

Accuracy = tuple[float, float]  # top-1 and top-5 in percent


def find_neighbors(
    train: Tensor, test: Tensor, k: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return the k most similar training photos of each test photo: similarity float32 [m, k],
    falling, and index int64 [m, k], on the CPU; n columns where n is less than k.

    train [n, C], test [m, C]: float32, normalized. Of equally similar photos the first ones win, on
    any device: similarity and index are packed into one integer, so that no two are equal. Memory
    beside both inputs is bounded. Raises ValueError for shapes or values that cannot be compared.
    """
    if train.dim() != 2 or test.dim() != 2 or train.shape[1] != test.shape[1] or not len(train):
        raise ValueError(
            f"features are {list(train.shape)} and {list(test.shape)}; "
            "give [n, C] and [m, C], of one width and n at least 1"
        )
    check_finite(train, test)
    test = test.to(device)
    best = torch.empty(len(test), 0, dtype=torch.int64, device=device)  # keys [m, k]
    for first in range(0, len(train), TRAIN_CHUNK):
        chunk = train[first : first + TRAIN_CHUNK].to(device)
        width = min(k, best.shape[1] + len(chunk))
        found = torch.empty(len(test), width, dtype=torch.int64, device=device)
        for row in range(0, len(test), TEST_CHUNK):
            rows = slice(row, row + TEST_CHUNK)
            keys = _pack(test[rows] @ chunk.T, first)
            found[rows] = torch.cat([best[rows], keys], dim=1).topk(width, dim=1).values
        best = found
    return _unpack(best.cpu())


def _pack(similarity: Tensor, first: int) -> Tensor:
    """Return keys int64 [b, n], in the order of similarity, then of falling index."""
    bits = (similarity + 0.0).view(torch.int32)  # adding 0 makes -0 to 0
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # floats' order, as integers
    index = torch.arange(first, first + similarity.shape[1], device=similarity.device)
    return (rising << 32) | (0xFFFFFFFF - index)


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    rising = (keys >> 32).int()
    similarity = torch.where(rising < 0, rising ^ 0x7FFFFFFF, rising).view(torch.float32)
    return similarity, 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def vote(
    similarity: Tensor,  # float32 [m, k], falling
    neighbor_labels: Tensor,  # int64 [m, k]
    labels: Tensor,  # int64 [m]
    temperature: float,
    num_classes: int,
) -> Accuracy:
    """Return top-1 and top-5 accuracy in percent of the neighbors' weighted vote.

    Of classes with equally many votes the lower number comes first. A class without any vote is
    never right: where fewer than five classes get votes, the published top-5 counts the classes
    that its sort happens to put next, so this one is the lower bound of it.
    """
    # Common factors cancel, and weights from the nearest's 1 downwards cannot overflow.
    weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
    classes = torch.arange(num_classes)
    top1 = top5 = 0
    step = max(1, VOTES // num_classes)
    for start in range(0, len(labels), step):
        rows = slice(start, start + step)
        target = labels[rows, None]  # [b, 1]
        votes = torch.zeros(len(target), num_classes, dtype=torch.float64)
        votes.scatter_add_(1, neighbor_labels[rows], weights[rows])
        own = votes.gather(1, target)
        ahead = (votes > own) | ((votes == own) & (classes < target))
        place = torch.where(own[:, 0] > 0, ahead.sum(1), num_classes + 5)
        top1 += int((place < 1).sum())
        top5 += int((place < 5).sum())
    return 100 * top1 / len(labels), 100 * top5 / len(labels)


def classify_by_k(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    ks: Sequence[int],
    temperature: float = TEMPERATURE,
    num_classes: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[int, Accuracy]:
    """Top-1 and top-5 accuracy in percent for several k at the price of the largest.

    Features float32 [n, C] and [m, C], normalized; labels int64 [n] and [m], below `num_classes`
    (default: as many as the labels need). Any number of photos and classes; k above n means n.
    Raises ValueError for empty sets, shapes that do not fit, or labels that are no class numbers.
    """
    if len(train_labels) != len(train_features) or len(test_labels) != len(test_features):
        raise ValueError(
            f"{len(train_features)} and {len(test_features)} features have {len(train_labels)} and "
            f"{len(test_labels)} labels; give one label a feature"
        )
    if not ks or not len(test_labels) or not len(train_labels):
        raise ValueError("k-NN needs at least one k, one training photo and one test photo")
    largest = 1 + int(max(train_labels.max(), test_labels.max()))
    num_classes = largest if num_classes is None else num_classes
    if min(train_labels.min(), test_labels.min()) < 0 or largest > num_classes:
        raise ValueError(f"labels must lie in 0 .. {num_classes - 1}, the number of classes less 1")
    check_votes(ks, temperature)
    similarity, index = find_neighbors(train_features, test_features, max(ks), device)
    labels = train_labels[index]
    return {
        k: vote(similarity[:, :k], labels[:, :k], test_labels, temperature, num_classes) for k in ks
    }


def classify_features(
    train: Features,
    val: Features,
    ks: Sequence[int],
    temperature: float = TEMPERATURE,
    num_classes: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[int, Accuracy]:
    """`classify_by_k` by class tokens."""
    features = [F.normalize(one["cls"], dim=1) for one in (train, val)]
    sets = (features[0], train.labels, features[1], val.labels)
    return classify_by_k(*sets, ks, temperature, num_classes, device)


class RawPixels(nn.Module):
    """The images themselves as features: [B, 3, S, S] -> tokens [B, 1, 3 x S x S]."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).unsqueeze(1)


def centered_pixels(
    train: str | Path, val: str | Path, size: int, how: Extraction
) -> tuple[Features, Features]:
    """Raw pixels of two sets, less the training set's mean, as class tokens."""
    first = PhotoSet(train, size)
    photos = (first, PhotoSet(val, size, first.classes))
    found = [extract(RawPixels(), one, ("cls",), how) for one in photos]
    mean = found[0]["cls"].mean(dim=0)
    memory, asked = (Features({"cls": (f["cls"] - mean).numpy()}, f.labels) for f in found)
    return memory, asked


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--k", type=int, nargs="+", default=KS, help="neighbors that vote")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help="of the votes")
    parser.add_argument(
        "--pixels", action="store_true", help=f"also raw {PIXELS} x {PIXELS} pixels"
    )


def check_votes(ks: Sequence[int], temperature: float) -> None:
    """Raise ValueError, naming the option, for values that cannot work."""
    if min(ks) < 1:
        raise ValueError(f"--k holds {min(ks)}; a vote needs at least 1 neighbor")
    if temperature <= 0:
        raise ValueError(f"--temperature is {temperature}; it must be above 0")


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError as `check_votes`."""
    check_votes(args.k, args.temperature)


def knn_scores(task: Task, train: Features | None = None) -> Scores:
    """Top-1 and top-5 in percent for each k, by the photos of `train` (all of the training set's);
    before them the best top-1 of all k. A k above the number of photos is that number.

    With --pixels those of centered raw pixels too, which no network changes: once.
    """
    train = train or task.train
    ks = sorted({min(k, len(train.labels)) for k in task.args.k})
    how: tuple[Any, ...] = (task.args.temperature, task.num_classes, task.how.device)
    by_k = classify_features(train, task.val, ks, *how)
    best = max(top1 for top1, _ in by_k.values())
    scores = {"best_top1": best, **_named("", by_k)}
    if task.args.pixels and train is task.train and task.network == task.args.network:
        size = min(PIXELS, task.train_photos.size)
        pixels = centered_pixels(task.args.train, task.args.val, size, task.how)
        scores |= _named("pixels_", classify_features(*pixels, ks, *how))
    return scores


def _named(prefix: str, by_k: dict[int, Accuracy]) -> Scores:
    return {
        f"{prefix}k{k}_top{n}": value
        for k, accuracy in by_k.items()
        for n, value in zip((1, 5), accuracy, strict=True)
    }


PROTOCOL = Protocol(
    "knn",
    "Accuracy of weighted k-NN, in percent.",
    lambda config: ("cls",),
    knn_scores,
    ("best_top1",),
    (add_options,),
    (check_options,),
)
main = PROTOCOL.main

if __name__ == "__main__":
    raise SystemExit(main())
