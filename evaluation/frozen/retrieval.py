"""Nearest-neighbor retrieval: mean average precision over the whole ranking.

Each validation photo ranks all training photos by cosine similarity of class tokens; those of its
class are what it looks for.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ibeton.evaluation.command import Protocol, Scores, Task

_SIMILARITIES = 1 << 24  # at a time, queries x photos


def mean_average_precision(
    photos: Tensor,  # float32 [n, C], normalized: what is searched
    labels: Tensor,  # int64 [n]
    queries: Tensor,  # float32 [m, C], normalized
    query_labels: Tensor,  # int64 [m]
    device: torch.device | str = "cpu",
) -> float:
    """In percent. Equally similar photos stand in their order; a query whose class is nowhere among
    the photos counts as 0."""
    photos, labels = photos.to(device), labels.to(device)
    ranks = torch.arange(1, len(photos) + 1, device=device, dtype=torch.float64)
    step, total = max(1, _SIMILARITIES // len(photos)), 0.0
    for part, own in zip(queries.split(step), query_labels.split(step), strict=True):
        similarity = part.to(device) @ photos.T  # [b, n]
        order = similarity.argsort(dim=1, descending=True, stable=True)
        relevant = labels[order] == own.to(device).unsqueeze(1)
        precision = relevant.cumsum(1) / ranks
        found = relevant.sum(1).clamp(min=1)
        total += float(((precision * relevant).sum(1) / found).sum())
    return 100 * total / len(queries)


def retrieval_scores(task: Task) -> Scores:
    """mAP in percent."""
    train, val = (F.normalize(one["cls"], dim=1) for one in (task.train, task.val))
    sets = (train, task.train.labels, val, task.val.labels)
    return {"map": mean_average_precision(*sets, task.how.device)}


PROTOCOL = Protocol(
    "retrieval",
    "Mean average precision of nearest neighbors.",
    lambda config: ("cls",),
    retrieval_scores,
    ("map",),
)
main = PROTOCOL.main

if __name__ == "__main__":
    raise SystemExit(main())
