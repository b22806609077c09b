"""What every loader is made from and what it has to give."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ibeton.pipeline.batch import BatchPlan, Crops, DeviceCrops
from ibeton.pipeline.loaders.replacements import Replacements
from ibeton.pipeline.sampling.draws import ViewSpec
from ibeton.pipeline.store.photos import Photos


@dataclass(frozen=True)
class LoaderContext:
    """The data, the views to cut of each photo, and the means to do it."""

    data: tuple[str, ...]  # paths
    photos: Photos
    views: list[ViewSpec]  # global ones first
    global_views: int
    batch_size: int
    workers: int
    batches_ahead: int
    seed: int
    replacements: Replacements
    device: torch.device  # where views are cut
    mean: Sequence[float]  # [3], as std on the 0..1 scale
    std: Sequence[float]


class Cutter(Protocol):
    """A loader at work: photos in, views out."""

    def stream(
        self, plans: Iterator[BatchPlan]
    ) -> Generator[tuple[BatchPlan, Crops | DeviceCrops], None, None]:
        """The views of each planned batch, in order. `plans` has no end: batches are prepared
        ahead, also those of the next epoch. Closing the generator ends the work on them."""

    def close(self) -> None:
        """End what outlives a stream, such as worker processes."""
