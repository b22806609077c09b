"""Accuracy of classifiers on a labeled set, by all processes together."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ibeton.distributed import rank_and_size
from ibeton.evaluation.frozen.features import Extraction, image_batches
from ibeton.evaluation.photos import PhotoViews
from ibeton.training.health.nonfinite_guard import RunError

TOP = 5


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How often the right class [B] is first, and among the first five, by logits [B, K]: int64
    [2]. Of equal logits the lower class comes first; a photo with one that is not finite counts as
    wrong."""
    order = logits.argsort(dim=1, descending=True, stable=True)[:, :TOP]
    right = (order == labels.unsqueeze(1)) & logits.isfinite().all(dim=1, keepdim=True)
    return torch.stack([right[:, :1].sum(), right.sum()])


def score(
    classifiers: Sequence[nn.Module], views: PhotoViews, how: Extraction
) -> list[dict[str, float]]:
    """Of each classifier top1 and top5 in percent over the photos that can be read, and how many
    cannot; photos are decoded once. In a process group every rank calls it and scores its share.
    Raises RunError if none can be read."""
    rank, world = rank_and_size()
    own = np.arange(rank, len(views), world)
    counts = torch.zeros(len(classifiers), 2, dtype=torch.int64, device=how.device)  # first, five
    seen = torch.zeros(1, dtype=torch.int64, device=how.device)
    for batch, images in image_batches(views, own, how, classifiers):
        labels = torch.from_numpy(views.labels[batch.indices]).to(how.device)
        for classifier, count in zip(classifiers, counts, strict=True):
            with torch.inference_mode(), how.autocast():
                logits = classifier(images).float()
            count += hits(logits, labels)
        seen += len(labels)
    if world > 1:
        dist.all_reduce(counts)
        dist.all_reduce(seen)
    scored = int(seen)
    if not scored:
        raise RunError("none of the validation photos can be read")
    unreadable = len(views) - scored
    return [
        {"top1": 100 * first / scored, "top5": 100 * five / scored, "unreadable": unreadable}
        for first, five in counts.tolist()
    ]
