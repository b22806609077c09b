"""Accuracy of a classifier on a labeled set, by all processes together."""

from contextlib import closing

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ibeton.distributed import rank_and_size
from ibeton.evaluation.frozen.features import Extraction, evaluating, normalized
from ibeton.evaluation.photos import PhotoViews, view_batches

TOP = 5


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How often the right class [B] is first, and among the first five, by logits [B, K]: int64
    [2]. Of equal logits the lower class comes first."""
    order = logits.argsort(dim=1, descending=True, stable=True)[:, :TOP]
    right = order == labels.unsqueeze(1)
    return torch.stack([right[:, :1].sum(), right.sum()])


def score(classifier: nn.Module, views: PhotoViews, how: Extraction) -> dict[str, float]:
    """top1 and top5 in percent over the photos that can be read, and how many cannot. In a process
    group every rank calls it and scores its share."""
    rank, world = rank_and_size()
    device = torch.device(how.device)
    counts = torch.zeros(4, dtype=torch.int64, device=device)  # first, five, scored, unreadable
    own = np.arange(rank, len(views), world)
    pinned = device.type == "cuda"
    batches = view_batches(views, own, how.batch_size, how.threads, pinned=pinned)
    with evaluating(classifier), torch.inference_mode(), closing(batches):
        for batch in batches:
            counts[3] += len(batch.unreadable)
            if not len(batch.indices):
                continue
            labels = torch.from_numpy(views.labels[batch.indices]).to(device)
            with how.autocast():
                logits = classifier(normalized(batch.images, device))
            counts[:2] += hits(logits.float(), labels)
            counts[2] += len(labels)
    if world > 1:
        dist.all_reduce(counts)
    first, five, scored, unreadable = counts.tolist()
    if not scored:
        raise ValueError("none of the validation photos can be read")
    return {"top1": 100 * first / scored, "top5": 100 * five / scored, "unreadable": unreadable}
