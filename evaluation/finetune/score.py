"""Accuracy of a classifier on a labeled set, by all processes together."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ibeton.distributed import rank_and_size
from ibeton.evaluation.frozen.features import Extraction, check_finite, image_batches
from ibeton.evaluation.photos import PhotoViews
from ibeton.training.health.nonfinite_guard import RunError

TOP = 5


def logits_of(classifier: nn.Module, images: Tensor, how: Extraction) -> Tensor:
    """Logits float32 [B, K] for normalized images [B, 3, S, S]. Raises ValueError as
    `check_finite`."""
    with torch.inference_mode(), how.autocast():
        logits = classifier(images).float()
    check_finite(logits)
    return logits


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How often the right class [B] is first, and among the first five, by logits [B, K]: int64
    [2]. Of equal logits the lower class comes first."""
    order = logits.argsort(dim=1, descending=True, stable=True)[:, :TOP]
    right = order == labels.unsqueeze(1)
    return torch.stack([right[:, :1].sum(), right.sum()])


def score(classifier: nn.Module, views: PhotoViews, how: Extraction) -> dict[str, float]:
    """top1 and top5 in percent over the photos that can be read, and how many cannot. In a process
    group every rank calls it and scores its share. Raises RunError if none can be read, ValueError
    if logits are not finite."""
    rank, world = rank_and_size()
    own = np.arange(rank, len(views), world)
    counts = torch.zeros(3, dtype=torch.int64, device=how.device)  # first, five, scored
    for batch, images in image_batches(views, own, how, [classifier]):
        labels = torch.from_numpy(views.labels[batch.indices]).to(how.device)
        counts[:2] += hits(logits_of(classifier, images, how), labels)
        counts[2] += len(labels)
    if world > 1:
        dist.all_reduce(counts)
    first, five, scored = counts.tolist()
    if not scored:
        raise RunError("none of the validation photos can be read")
    unreadable = len(views) - scored
    return {"top1": 100 * first / scored, "top5": 100 * five / scored, "unreadable": unreadable}
