"""Unsupervised classification: do clusters found without labels agree with the classes?

Clusters of the validation set come from the projection head (the prototype that it gives each class
token, as published) and from k-means on normalized class tokens of the training set, with as many
clusters as classes. Accuracy gives each class one cluster, by Hungarian matching; clusters beyond
are wrong. ARI, NMI (arithmetic mean, as published) and Fowlkes-Mallows take any number of clusters.
Few or uneven clusters raise the last by themselves: beside it stands what their sizes alone give.
"""

import math

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ibeton.evaluation.command import Protocol, Scores, Task

MINI_BATCHES_FROM = 100_000  # photos, from which on k-means takes mini-batches
_INITS = 10  # starts of k-means, of which the best is kept


def hungarian_accuracy(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Share of photos whose cluster is matched with their class, by the best one-to-one matching.

    labels, clusters: int [n], any numbers, any number of either. Raises ValueError if they do not
    fit or are empty.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics.cluster import contingency_matrix

    if labels.shape != clusters.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(
            f"labels {list(labels.shape)} and clusters {list(clusters.shape)}:"
            " expected two lists of one length, at least 1"
        )
    counts = contingency_matrix(labels, clusters)
    matched = linear_sum_assignment(counts, maximize=True)
    return float(counts[matched].sum() / len(labels))


def chance_fmi(labels: np.ndarray, clusters: np.ndarray) -> float:
    """The Fowlkes-Mallows index of clusters of these sizes independent of the labels: with
    T' of T pairs of photos in one class and T'' in one cluster, sqrt(T' T'') / T (Fowlkes and
    Mallows 1983). labels, clusters: int [n]."""

    def together(names: np.ndarray) -> float:
        sizes = np.unique(names, return_counts=True)[1]
        return float((sizes * (sizes - 1.0)).sum())

    return math.sqrt(together(labels) * together(clusters)) / max(1, len(labels) ** 2 - len(labels))


def agreement(labels: np.ndarray, clusters: np.ndarray) -> Scores:
    """acc, ari, nmi, fmi, fmi_chance in percent, and the number of clusters: see the module."""
    from sklearn.metrics import (
        adjusted_rand_score,
        fowlkes_mallows_score,
        normalized_mutual_info_score,
    )

    return {
        "acc": 100 * hungarian_accuracy(labels, clusters),
        "ari": 100 * float(adjusted_rand_score(labels, clusters)),
        "nmi": 100 * float(normalized_mutual_info_score(labels, clusters)),
        "fmi": 100 * float(fowlkes_mallows_score(labels, clusters)),
        "fmi_chance": 100 * chance_fmi(labels, clusters),
        "clusters": len(np.unique(clusters)),
    }


def kmeans(train: Tensor, val: Tensor, clusters: int, seed: int = 0) -> np.ndarray:
    """The cluster int32 [m] of each of val [m, C], by k-means on train [n, C]."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    kind = MiniBatchKMeans if len(train) >= MINI_BATCHES_FROM else KMeans
    found = kind(min(clusters, len(train)), n_init=_INITS, random_state=seed).fit(train.numpy())
    return found.predict(val.numpy())


def cluster_scores(task: Task) -> Scores:
    """Agreement of k-means, and of the head where the checkpoint has one, with the classes."""
    labels = task.val.labels.numpy()
    train, val = (F.normalize(one["cls"], dim=1) for one in (task.train, task.val))
    found = {"kmeans": kmeans(train, val, task.num_classes)}
    if "prototype" in task.val.arrays:
        found["head"] = task.val.arrays["prototype"]
    return {
        f"{name}_{score}": value
        for name, clusters in found.items()
        for score, value in agreement(labels, clusters).items()
    }


PROTOCOL = Protocol(
    "cluster",
    "Unsupervised classification by the head and by k-means.",
    lambda config: ("cls", "prototype"),
    cluster_scores,
    ("kmeans_acc", "kmeans_nmi"),
)
main = PROTOCOL.main

if __name__ == "__main__":
    raise SystemExit(main())
