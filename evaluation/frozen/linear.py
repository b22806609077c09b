"""Linear probing: a linear layer on frozen features, for all learning rates at once.

As published: SGD with momentum 0.9, no weight decay, 100 epochs, batch 1024, 45 learning rates
n x 10^p x batch / 256 with n = 1 .. 9 and p = -4 .. 0, each falling on a cosine to 0 by epoch;
weights start normal (0.01), biases at 0. The figure is the best learning rate's at its best epoch,
both chosen on the validation set, as published; JSON and table also say what the last epoch gives.

Features: class tokens of the last four blocks; for ViT-B and ViT-L, class token and mean patch
token of the last block. They are those of the evaluation views, computed once. `--augmented` is the
published way: every epoch computes those of new random crops and flips, one forward pass for all
learning rates.

`--save-head` keeps the layer of the rate that is best after the last epoch, for
`evaluation.robustness`.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ibeton.evaluation.command import Protocol, Scores, Task
from ibeton.evaluation.frozen.features import Extraction, feature_batches
from ibeton.evaluation.frozen.heads import RATES, Batches, LinearHeads, LinearSettings, train_heads
from ibeton.evaluation.networks import weights_digest
from ibeton.evaluation.photos import PhotoSet
from ibeton.model.checkpoint import save_checkpoint
from ibeton.options import check_output_file


def shuffled(
    features: Tensor, labels: Tensor, settings: LinearSettings
) -> Callable[[int], Batches]:
    """Batches of features [n, C], in a new order every epoch; the last one may be small."""

    def batches(epoch: int) -> Batches:
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(labels))
        for first in range(0, len(order), settings.batch_size):
            rows = torch.from_numpy(order[first : first + settings.batch_size])
            yield features.index_select(0, rows), labels[rows]

    return batches


def augmented(
    backbone: nn.Module,
    photos: PhotoSet,
    names: Sequence[str],
    how: Extraction,
    settings: LinearSettings,
) -> Callable[[int], Batches]:
    """Batches of features of random views, computed anew every epoch."""

    def batches(epoch: int) -> Batches:
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(photos))
        size, features, labels = settings.batch_size, torch.empty(0), torch.empty(0).long()
        for indices, found in feature_batches(backbone, photos, names, order, how, epoch=epoch):
            features = torch.cat([features, joined(found, names)])
            labels = torch.cat([labels, torch.from_numpy(photos.labels[indices])])
            while len(labels) >= size:
                yield features[:size], labels[:size]
                features, labels = features[size:], labels[size:]
        if len(labels):
            yield features, labels

    return batches


def feature_names(config: dict[str, Any]) -> tuple[str, ...]:
    """What published linear probing feeds: by architecture."""
    return ("cls", "patch_mean") if config["arch"] in ("vit_b", "vit_l") else ("blocks",)


def joined(found: dict[str, np.ndarray], names: Sequence[str]) -> Tensor:
    parts = [torch.from_numpy(found[name]) for name in names]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=int, default=100, help="of linear probing")
    parser.add_argument("--sgd-batch", type=int, default=1024, help="photos per step of SGD")
    parser.add_argument(
        "--lr", type=float, nargs="+", default=RATES, help="learning rates for a batch of 256"
    )


def add_own_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--augmented",
        action="store_true",
        help="linear: new random crops and flips every epoch, as published (a forward pass per"
        " epoch)",
    )
    parser.add_argument("--save-head", type=Path, help="linear: file to keep the layer in")


def check_head_option(args: argparse.Namespace) -> None:
    """Raise ValueError or OSError for a file that cannot be written."""
    if args.save_head is not None:
        check_output_file("--save-head", args.save_head, ".pt")


def settings_of(args: argparse.Namespace) -> LinearSettings:
    return LinearSettings(args.epochs, args.sgd_batch, tuple(args.lr))


def linear_scores(task: Task, rows: Tensor | None = None) -> Scores:
    """Top-1 in percent: the best of all rates and epochs; that rate, its epoch, and the best at the
    last epoch. `rows` int64: train on these photos of the training set alone."""
    names, settings = feature_names(task.config), settings_of(task.args)
    if rows is None and task.args.augmented:
        batches = augmented(task.backbone, task.train_photos, names, task.how, settings)
    else:
        features, labels = joined(task.train.arrays, names), task.train.labels
        if rows is not None:
            features, labels = features[rows], labels[rows]
        batches = shuffled(features, labels, settings)
    val = joined(task.val.arrays, names)
    sets = (batches, val, task.val.labels, task.num_classes)
    heads, accuracies = train_heads(*sets, settings, task.how.device)
    path = getattr(task.args, "save_head", None)
    if path is not None and rows is None and task.network == task.args.network:
        save_checkpoint(path, head_content(task, heads, accuracies[-1], settings))
    return best_scores(accuracies, settings)


def head_content(
    task: Task,
    heads: LinearHeads,
    accuracies: np.ndarray,  # [H], after the last epoch
    settings: LinearSettings,
) -> dict[str, Any]:
    """What `--save-head` writes: the best layer after the last epoch, and what it belongs to."""
    best = int(accuracies.argmax())
    return {
        "weight": heads.weight[:, best].cpu().clone(),  # [K, C]
        "bias": heads.bias[:, best].cpu().clone(),  # [K]
        "features": list(feature_names(task.config)),
        "classes": task.train_photos.classes,
        "image_size": task.train_photos.size,
        "backbone": weights_digest(task.backbone),
        "lr": settings.rates[best],
        "top1": float(accuracies[best]),
    }


def best_scores(accuracies: np.ndarray, settings: LinearSettings) -> Scores:
    """The scores of accuracies [epochs, H]."""
    epoch, head = np.unravel_index(accuracies.argmax(), accuracies.shape)
    return {
        "top1": float(accuracies[epoch, head]),
        "lr": settings.rates[head],
        "epoch": int(epoch) + 1,
        "last_epoch_top1": float(accuracies[-1].max()),
    }


PROTOCOL = Protocol(
    "linear",
    "Linear probing, all learning rates at once.",
    feature_names,
    linear_scores,
    ("top1",),
    (add_options, add_own_options),
    (settings_of, check_head_option),
)
main = PROTOCOL.main

if __name__ == "__main__":
    raise SystemExit(main())
