"""k-NN, linear probing and logistic regression with few labels: 1 % and 10 % of the training set.

The subset has equally many photos of each class (as far as a class has them), at least one, drawn
from a seed. The published lists are those of SimCLRv2 for ImageNet; these are of any set.
"""

import argparse

import numpy as np
import torch
from torch import Tensor

from ibeton.evaluation.command import Protocol, Scores, Task
from ibeton.evaluation.frozen import knn, linear
from ibeton.evaluation.frozen.features import Features
from ibeton.evaluation.frozen.logistic import logistic_scores

SHARES = (0.01, 0.1)


def balanced_subset(labels: Tensor, share: float, seed: int = 0) -> Tensor:
    """Rows int64, rising, of `share` of all photos: equally many of each class that there is.

    labels: int64 [n]. A class with fewer photos gives all that it has. Raises ValueError for a
    share that is not in 0 .. 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share of {share} of the labels: expected above 0, at most 1")
    classes = np.unique(labels.numpy())
    each = max(1, round(share * len(labels) / len(classes)))
    generator = np.random.default_rng(seed)
    rows = [
        generator.permutation(np.flatnonzero(labels.numpy() == label))[:each] for label in classes
    ]
    return torch.from_numpy(np.sort(np.concatenate(rows)))


def semi_scores(task: Task) -> Scores:
    """Top-1 in percent of each way for each share, and the number of labels.

    k-NN is that of the k for which it is best, as few labels need few neighbors.
    """
    scores: Scores = {}
    for share in SHARES:
        rows = balanced_subset(task.train.labels, share, task.args.subset_seed)
        few = Features({"cls": task.train["cls"][rows].numpy()}, task.train.labels[rows])
        by_k = knn.knn_scores(task, few)
        name = f"{share:.0%}"
        scores[f"{name}_logistic_top1"] = logistic_scores(task, rows)["top1"]
        scores[f"{name}_linear_top1"] = linear.linear_scores(task, rows)["top1"]
        scores[f"{name}_knn_top1"] = by_k["best_top1"]
        scores[f"{name}_labels"] = len(rows)
    return scores


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--subset-seed", type=int, default=0, help="of the few labels")


PROTOCOL = Protocol(
    "semi",
    "k-NN, linear probing and logistic regression on 1 % and 10 % of the labels.",
    lambda config: ("cls", *linear.feature_names(config)),
    semi_scores,
    ("1%_linear_top1", "10%_linear_top1"),
    (knn.add_options, linear.add_options, add_options),
    (knn.check_options, linear.settings_of),
)
main = PROTOCOL.main

if __name__ == "__main__":
    raise SystemExit(main())
