"""What every loader is made from and what it has to give."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from ibeton.pipeline.batch import BatchPlan, Crops, Decoded, DeviceCrops
from ibeton.pipeline.config import PipelineConfig
from ibeton.pipeline.loaders.replacements import Replacements
from ibeton.pipeline.sampling.draws import ViewSpec
from ibeton.pipeline.store.photos import Photos
from ibeton.workers import cores

if TYPE_CHECKING:
    from ibeton.pipeline.loaders.gpu_decode import GpuDecoding


@dataclass(frozen=True)
class LoaderContext:
    """The settings, the photos, and the means to cut them."""

    config: PipelineConfig
    photos: Photos
    replacements: Replacements
    views: list[ViewSpec]  # of each photo, global ones first
    device: torch.device  # where views are cut
    gpu_decoding: "GpuDecoding | None" = None  # the GPU's share of the decoding

    @property
    def workers(self) -> int:
        """Threads or processes."""
        return self.config.workers or cores()

    def split(self) -> tuple[list[ViewSpec], list[ViewSpec]]:
        """Global and local views."""
        count = self.config.global_crops_number
        return self.views[:count], self.views[count:]


def context_of(
    config: PipelineConfig,
    photos: Photos,
    device: torch.device | str = "cpu",
    gpu_decoding: "GpuDecoding | None" = None,
    views: list[ViewSpec] | None = None,
) -> LoaderContext:
    """The context of `config`; `views` are those of the config if not given."""
    views = config.views() if views is None else views
    replacements = Replacements(photos, views, config.seed)
    return LoaderContext(config, photos, replacements, views, torch.device(device), gpu_decoding)


class PhotoSource(Protocol):
    """Decodes photos, in order, ahead of who asks."""

    def stream(
        self, plans: Iterator[BatchPlan]
    ) -> Generator[tuple[BatchPlan, Decoded], None, None]: ...

    def close(self) -> None:
        """End what outlives a stream, such as worker processes: by default nothing does."""
        return


class Cutter(Protocol):
    """A loader at work: photos in, views out."""

    def stream(
        self, plans: Iterator[BatchPlan]
    ) -> Generator[tuple[BatchPlan, Crops | DeviceCrops], None, None]:
        """The views of each planned batch, in order. `plans` has no end: batches are prepared
        ahead, also those of the next epoch. Closing the generator ends the work on them."""

    def close(self) -> None:
        """As `PhotoSource.close`."""
        return
