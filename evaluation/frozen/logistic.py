"""Multinomial logistic regression on frozen features.

As published: normalized class tokens of the last block, L2 penalty, no intercept, strengths 0.01,
0.1 and 1, handed undivided to cyanure's `MultiClassifier`. That minimizes the mean cross-entropy +
strength / 2 |W|^2, by its documentation and by running it (the tests hold its weights), and
so does this. The strength is chosen on a fifth of the training set, then all of it is used: the
validation set is looked at once.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ibeton.evaluation.command import Protocol, Scores, Task

STRENGTHS = (0.01, 0.1, 1.0)
HELD_OUT = 0.2
_LOGITS = 1 << 26  # at a time, photos x classes: 256 MiB
_STEPS, _TOLERANCE = 200, 1e-5  # of L-BFGS: most steps, largest gradient at the end


def fit_logistic(
    features: Tensor,  # float32 [n, C]
    labels: Tensor,  # int64 [n], below `num_classes`
    num_classes: int,
    strength: float,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Weights [C, K] of the convex problem above, by full-batch L-BFGS, on `device`."""
    weight = torch.zeros(features.shape[1], num_classes, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=_STEPS, tolerance_grad=_TOLERANCE, line_search_fn="strong_wolfe"
    )

    step = _step(num_classes)

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = strength / 2 * weight.square().sum()
        total.backward()
        for part, own in zip(features.split(step), labels.split(step), strict=True):
            logits = part.to(device) @ weight
            share = F.cross_entropy(logits, own.to(device), reduction="sum") / len(labels)
            share.backward()
            total = total.detach() + share.detach()
        return total

    optimizer.step(loss)
    return weight.detach()


def _step(classes: int) -> int:
    """Photos at a time."""
    return max(1, _LOGITS // classes)


def top1(weight: Tensor, features: Tensor, labels: Tensor) -> float:
    """Accuracy in percent of weights [C, K] on features [m, C]."""
    step = _step(weight.shape[1])
    right = sum(
        int(((part.to(weight.device) @ weight).argmax(1).cpu() == own).sum())
        for part, own in zip(features.split(step), labels.split(step), strict=True)
    )
    return 100 * right / len(labels)


def split_held_out(labels: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows int64 to train on and rows held out: a fifth of each class, rounded, never all."""
    generator = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels.numpy()):
        rows = generator.permutation(np.flatnonzero(labels.numpy() == label))
        held[rows[: min(round(HELD_OUT * len(rows)), len(rows) - 1)]] = True
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))


def logistic_scores(task: Task, rows: Tensor | None = None) -> Scores:
    """Top-1 in percent and the strength. `rows` int64: train on these photos of the training set
    alone. Where they are too few to hold any out, the strength is the middle one."""
    features, labels = task.train["cls"], task.train.labels
    if rows is not None:
        features, labels = features[rows], labels[rows]
    features = F.normalize(features, dim=1)
    learn, held = split_held_out(labels)
    strength, device = STRENGTHS[1], task.how.device
    if len(held):
        by_strength = {}
        for candidate in STRENGTHS:
            sets = (features[learn], labels[learn], task.num_classes)
            weight = fit_logistic(*sets, candidate, device)
            by_strength[candidate] = top1(weight, features[held], labels[held])
        strength = max(by_strength, key=by_strength.__getitem__)
    weight = fit_logistic(features, labels, task.num_classes, strength, device)
    val = F.normalize(task.val["cls"], dim=1)
    return {"top1": top1(weight, val, task.val.labels), "strength": strength}


PROTOCOL = Protocol(
    "logistic",
    "Multinomial logistic regression.",
    lambda config: ("cls",),
    logistic_scores,
    ("top1",),
)
main = PROTOCOL.main

if __name__ == "__main__":
    raise SystemExit(main())
