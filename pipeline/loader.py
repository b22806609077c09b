"""`build_loader` gives finished batches on the training device."""

import itertools
import logging
from collections.abc import Generator, Iterator

import torch

from ibeton.pipeline.batch import Batch, BatchPlan, Crops, DeviceCrops, normalized
from ibeton.pipeline.config import PipelineConfig
from ibeton.pipeline.loaders.context import context_of
from ibeton.pipeline.loaders.kinds import choose_crops, choose_decoding, choose_loader
from ibeton.pipeline.memory import keep_freed_memory
from ibeton.pipeline.sampling.masks import MaskConfig, draw_masks
from ibeton.pipeline.sampling.order import epoch_order, rank_batches, steps_per_epoch
from ibeton.pipeline.store.joined import open_all
from ibeton.stages import stage

log = logging.getLogger(__name__)


class Loader:
    """Finished batches of one rank; every rank draws from the same epoch order.

    The same (seed, epoch, sample index) gives the same crops and masks with any loader, worker
    count, batch size and rank.
    """

    def __init__(
        self, config: PipelineConfig, device: torch.device, rank: int, world_size: int
    ) -> None:
        config.check()
        keep_freed_memory()
        self.masks = MaskConfig(
            shape=config.pred_shape,
            ratio=config.pred_ratio,
            ratio_var=config.pred_ratio_var,
            start_epoch=config.pred_start_epoch,
        )
        self.photos = open_all(config.data)
        if rank == 0:
            for note in self.photos.notes:
                log.warning(note)
        self.steps_per_epoch = steps_per_epoch(len(self.photos), config.batch_size, world_size)
        self.kind, self.reason = choose_loader(config, device)
        self.crops_on = choose_crops(config, self.kind, device)
        gpu_decoding, how = choose_decoding(config, self.kind, self.photos, device)
        self.reason += f"; {how}" if how else ""
        self._config = config
        self._rank, self._world_size = rank, world_size
        self._mean = torch.tensor(config.mean, device=device)
        self._std = torch.tensor(config.std, device=device)
        cut_on = device if self.crops_on == "gpu" else "cpu"
        context = context_of(config, self.photos, cut_on, gpu_decoding)
        # Photos that could not be decoded so far: index -> name and reason.
        self.unreadable = context.replacements.unreadable
        self._cutter = self.kind.build(context)
        # The work under way, and the (epoch, step) that it gives next.
        self._stream: Generator[tuple[BatchPlan, Crops | DeviceCrops], None, None] | None = None
        self._next = (-1, -1)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from step `first_step` on, each on the device.

        The first batches of the next epoch are prepared while the last ones are consumed: asked for
        next, it begins without a wait.
        """
        for step in range(first_step, self.steps_per_epoch):
            if self._stream is None or self._next != (epoch, step):
                self.discard_ahead()
                self._stream = self._cutter.stream(self._plans(epoch, step))
            last = step + 1 == self.steps_per_epoch
            self._next = (epoch + 1, 0) if last else (epoch, step + 1)
            try:
                plan, crops = next(self._stream)
            except BaseException:
                self.discard_ahead()
                raise
            yield self._finish(plan, crops)

    def _plans(self, epoch: int, step: int) -> Iterator[BatchPlan]:
        """All batches from (epoch, step) on, without end."""
        for number in itertools.count(epoch):
            order = epoch_order(len(self.photos), self._config.seed, number)
            batches = rank_batches(
                order, self._config.batch_size, self._rank, self._world_size, step
            )
            for indices in batches:
                yield BatchPlan(number, indices)
            step = 0

    def _finish(self, plan: BatchPlan, crops: Crops | DeviceCrops) -> Batch:
        config = self._config
        global_crops, local_crops = crops.global_crops, crops.local_crops
        if isinstance(crops, Crops):
            with stage("copy"):
                global_crops = normalized(global_crops, self._mean, self._std)
                local_crops = normalized(local_crops, self._mean, self._std)
        cells = config.global_crops_size // config.patch_size
        with stage("mask"):
            masks = draw_masks(
                self.masks,
                config.seed,
                plan.epoch,
                plan.indices,
                config.global_crops_number,
                (cells, cells),
            )
        used = crops.indices.clone()
        return Batch(
            global_crops=global_crops,
            local_crops=local_crops,
            masks=torch.from_numpy(masks),
            labels=torch.from_numpy(self.photos.labels[used.numpy()]),
            indices=used,
        )

    def discard_ahead(self) -> None:
        """Stop the work on batches that were not asked for yet. The next epoch begins anew."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def close(self) -> None:
        """End threads and worker processes."""
        self.discard_ahead()
        self._cutter.close()


def build_loader(
    config: PipelineConfig,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """Open the data and start the loader that `config` asks for.

    Raises ValueError or FileNotFoundError with a sentence that names the option or the file.
    """
    return Loader(config, torch.device(device), rank, world_size)
