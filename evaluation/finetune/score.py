"""Accuracy of a classifier on a labeled set, by all processes together."""

from contextlib import closing

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from ibeton.evaluation.frozen.features import evaluating, normalized
from ibeton.evaluation.photos import Sample, evaluation_view, view_batches
from ibeton.pipeline.store.decode import UnreadablePhoto
from ibeton.pipeline.store.photos import Photos

TOP = 5


class CenterViews:
    """The center views of a labeled set, for `view_batches`: shorter side resized to `size` x 256 /
    224 with `interpolation`, center `size` x `size`."""

    def __init__(self, photos: Photos, size: int, interpolation: str = "bilinear") -> None:
        self.photos, self.size = photos, size
        self._resample = Image.Resampling[interpolation.upper()]

    def __len__(self) -> int:
        return len(self.photos)

    def sample(self, index: int, epoch: int | None = None) -> Sample:
        """The view of a photo, its label, and why there is no view."""
        label = int(self.photos.labels[index])
        try:
            image = Image.fromarray(self.photos.pixels(index))
        except UnreadablePhoto as reason:
            return None, label, f"{self.photos.name(index)}: {reason}"
        return evaluation_view(image, self.size, self._resample), label, ""


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How often the right class [B] is first, and among the first five, by logits [B, K]: int64
    [2]. Of equal logits the lower class comes first."""
    order = logits.argsort(dim=1, descending=True, stable=True)[:, :TOP]
    right = order == labels.unsqueeze(1)
    return torch.stack([right[:, :1].sum(), right.sum()])


def score(
    classifier: nn.Module,
    views: CenterViews,
    device: torch.device,
    batch_size: int = 128,
    threads: int = 0,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """top1 and top5 in percent over the photos that can be read, and how many cannot.

    `dtype` is that of autocast. In a process group every rank calls it and scores its share.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    counts = torch.zeros(4, dtype=torch.int64, device=device)  # first, five, scored, unreadable
    own = np.arange(rank, len(views), world)
    pinned = device.type == "cuda"
    batches = view_batches(views, own, batch_size, threads, pinned=pinned)
    with evaluating(classifier), torch.inference_mode(), closing(batches):
        for batch in batches:
            counts[3] += len(batch.unreadable)
            if not len(batch.indices):
                continue
            labels = torch.from_numpy(views.photos.labels[batch.indices]).to(device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                logits = classifier(normalized(batch.images, device))
            counts[:2] += hits(logits.float(), labels)
            counts[2] += len(labels)
    if world > 1:
        dist.all_reduce(counts)
    first, five, scored, unreadable = counts.tolist()
    if not scored:
        raise ValueError("none of the validation photos can be read")
    return {
        "top1": 100 * first / scored,
        "top5": 100 * five / scored,
        "unreadable": unreadable,
    }
