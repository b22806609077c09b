"""Linear probing: a linear layer on frozen features, for all learning rates at once.

As published: SGD with momentum 0.9, no weight decay, 100 epochs, batch 1024, 45 learning rates
n x 10^p x batch / 256 with n = 1 .. 9 and p = -4 .. 0, each falling on a cosine to 0 by epoch;
weights start normal (0.01), biases at 0. The figure is the best learning rate's at its best epoch,
both chosen on the validation set, as published; JSON and table also say what the last epoch gives.

Features: class tokens of the last four blocks; for ViT-B and ViT-L, class token and mean patch
token of the last block. They are those of the evaluation views, computed once. `--augmented` is the
published way: every epoch computes those of new random crops and flips, one forward pass for all
learning rates.

    python -m evaluation.linear --checkpoint CHECKPOINT --train FOLDER_OR_BETON --val ...
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.command import Protocol, Scores, Task, command
from evaluation.features import feature_batches

RATES = tuple(n * 10.0**p for p in range(-4, 1) for n in range(1, 10))  # for a batch of 256
MOMENTUM = 0.9
INIT_STD = 0.01

Batches = Iterator[tuple[Tensor, Tensor]]  # features float32 [b, C], labels int64 [b]


@dataclass(frozen=True)
class LinearSettings:
    """Optimisation of the heads."""

    epochs: int = 100
    batch_size: int = 1024
    rates: tuple[float, ...] = RATES  # learning rates for a batch of 256
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError, naming the option, for values that cannot work."""
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError("--epochs and --sgd-batch must be at least 1")
        if not self.rates or min(self.rates) <= 0:
            raise ValueError("--lr must be above 0")


class LinearHeads(torch.nn.Module):
    """H linear layers that see the same features: [b, C] -> logits [H, b, K].

    All start equal, so that a head's course does not depend on which others are trained with it.
    """

    def __init__(self, heads: int, width: int, classes: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = INIT_STD * torch.randn(1, width, classes, generator=generator)
        self.weight = torch.nn.Parameter(weight.repeat(heads, 1, 1))  # [H, C, K]
        self.bias = torch.nn.Parameter(torch.zeros(heads, 1, classes))

    def forward(self, features: Tensor) -> Tensor:
        # One product of matrices for all heads; a batched one takes three times as long on a CPU.
        return torch.einsum("bc,hck->hbk", features, self.weight) + self.bias


def train_heads(
    batches: Callable[[int], Batches],  # of an epoch
    val: Tensor,  # features [m, C]
    val_labels: Tensor,  # int64 [m]
    num_classes: int,
    settings: LinearSettings,
    device: torch.device | str = "cpu",
) -> tuple[LinearHeads, np.ndarray]:
    """The heads after the last epoch, and top-1 in percent, float [epochs, H], after each."""
    settings.check()
    heads = LinearHeads(len(settings.rates), val.shape[1], num_classes, settings.seed).to(device)
    scale = settings.batch_size / 256
    rates = torch.tensor(settings.rates, dtype=torch.float32, device=device) * scale  # [H]
    # A head's loss times its rate, at a rate of 1, moves it as its own loss does at its rate:
    # momentum SGD is linear in the gradient. So one stock optimiser serves all.
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=MOMENTUM)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    accuracies = np.empty((settings.epochs, len(rates)))
    for epoch in range(settings.epochs):
        for features, labels in batches(epoch):
            logits = heads(features.to(device))  # [H, b, K]
            target = labels.to(device).repeat(len(rates))
            losses = F.cross_entropy(logits.flatten(0, 1), target, reduction="none")
            losses = losses.view(len(rates), -1).mean(1)  # [H]
            optimizer.zero_grad()
            losses.backward(rates)
            optimizer.step()
        cosine.step()
        accuracies[epoch] = accuracy(heads, val, val_labels)
    return heads, accuracies


@torch.no_grad()
def accuracy(heads: LinearHeads, features: Tensor, labels: Tensor, chunk: int = 1024) -> np.ndarray:
    """Top-1 of each head in percent, float [H]."""
    device = heads.weight.device
    right = torch.zeros(len(heads.weight), device=device)
    for part, own in zip(features.split(chunk), labels.split(chunk), strict=True):
        right += (heads(part.to(device)).argmax(2) == own.to(device)).sum(1)
    return 100 * right.cpu().numpy() / len(labels)


def shuffled(
    features: Tensor, labels: Tensor, settings: LinearSettings
) -> Callable[[int], Batches]:
    """Batches of features [n, C] at hand, in a new order every epoch; the last one may be small."""

    def batches(epoch: int) -> Batches:
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(labels))
        for first in range(0, len(order), settings.batch_size):
            rows = torch.from_numpy(order[first : first + settings.batch_size])
            yield features[rows], labels[rows]

    return batches


def augmented(
    task: Task, names: Sequence[str], settings: LinearSettings
) -> Callable[[int], Batches]:
    """Batches of features of random views, computed anew every epoch."""
    photos = task.train_photos

    def batches(epoch: int) -> Batches:
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(photos))
        waiting: list[tuple[Tensor, Tensor]] = []
        parts = feature_batches(task.backbone, photos, names, order, task.how, epoch=epoch)
        for indices, found in parts:
            waiting.append((_joined(found, names), torch.from_numpy(photos.labels[indices])))
            if sum(len(labels) for _, labels in waiting) >= settings.batch_size:
                features, labels = (torch.cat(part) for part in zip(*waiting, strict=True))
                size = settings.batch_size
                yield features[:size], labels[:size]
                waiting = [(features[size:], labels[size:])]
        features, labels = (torch.cat(part) for part in zip(*waiting, strict=True))
        if len(labels):
            yield features, labels

    return batches


def feature_names(config: dict[str, Any]) -> tuple[str, ...]:
    """What published linear probing feeds: by architecture."""
    return ("cls", "patch_mean") if config["arch"] in ("vit_b", "vit_l") else ("blocks",)


def _joined(found: dict[str, np.ndarray], names: Sequence[str]) -> Tensor:
    parts = [torch.from_numpy(found[name]) for name in names]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=int, default=100, help="of linear probing")
    parser.add_argument("--sgd-batch", type=int, default=1024, help="photos a step of SGD")
    parser.add_argument(
        "--lr", type=float, nargs="+", default=RATES, help="learning rates for a batch of 256"
    )
    parser.add_argument(
        "--augmented",
        action="store_true",
        help="new random crops and flips every epoch, as published (a forward pass an epoch)",
    )


def settings_of(args: argparse.Namespace) -> LinearSettings:
    settings = LinearSettings(args.epochs, args.sgd_batch, tuple(args.lr))
    settings.check()
    return settings


def linear_scores(task: Task, rows: Tensor | None = None) -> Scores:
    """Top-1 in percent: the best of all rates and epochs; that rate, its epoch, and the best at the
    last epoch. `rows` int64: learn from these photos of the training set alone."""
    names, settings = feature_names(task.config), settings_of(task.args)
    if task.args.augmented and rows is None:
        batches = augmented(task, names, settings)
    else:
        features, labels = _joined(task.train.arrays, names), task.train.labels
        if rows is not None:
            features, labels = features[rows], labels[rows]
        batches = shuffled(features, labels, settings)
    val = _joined(task.val.arrays, names)
    sets = (batches, val, task.val.labels, task.num_classes)
    accuracies = train_heads(*sets, settings, task.how.device)[1]
    return best_scores(accuracies, settings)


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
    "linear probing, all learning rates at once",
    feature_names,
    linear_scores,
    ("top1",),
    (add_options,),
    (settings_of,),
)


def main(argv: Sequence[str] | None = None) -> int:
    return command([PROTOCOL], argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
