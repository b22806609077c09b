"""The one door to the data: `build_loader` gives finished batches on the training device."""

import importlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from ibeton.pipeline.batch import Batch, Crops, DeviceCrops, normalized
from ibeton.pipeline.config import PipelineConfig
from ibeton.pipeline.loaders.memory import keep_freed_memory
from ibeton.pipeline.loaders.replacements import Replacements
from ibeton.pipeline.sampling.masks import MaskConfig, draw_masks
from ibeton.pipeline.sampling.order import epoch_order, rank_batches, steps_per_epoch
from ibeton.pipeline.store.photos import is_beton, open_photos
from ibeton.stages import stage
from ibeton.workers import cores

_INSTALL_DALI = "pip install -c constraints.txt -e '.[dali]'"


def ffcv_problem() -> str:
    """Why ffcv cannot be used here, and the cure; empty where it can."""
    return _problem("ffcv", "ffcv", "make ffcv")


def dali_problem() -> str:
    """Why NVIDIA DALI cannot be used here, and the cure; empty where it can."""
    return _problem("nvidia.dali", "nvidia-dali", _INSTALL_DALI)


def _problem(module: str, package: str, install: str) -> str:
    try:
        importlib.import_module(module)
    except ImportError as error:  # also where a library that it was built with is gone
        missing = isinstance(error, ModuleNotFoundError) and module.startswith(error.name or "?")
        state = "not installed" if missing else f"broken ({error})"
        return (
            f"{package} is {state}: `{install}` installs it, `python -m pipeline.doctor` explains"
        )
    return ""


class Cutter(Protocol):
    """What makes the crops: FfcvCrops, GpuFeed, DaliCrops or PilCrops."""

    def batches(self, epoch: int, batches: np.ndarray) -> Iterator[Crops | DeviceCrops]: ...

    def close(self) -> None: ...


def choose_loader(config: PipelineConfig, device: torch.device) -> tuple[str, str]:
    """The loader for `config`, 'ffcv', 'dali' or 'pil', and why, in one line.

    DALI, where it is not asked for, stands in for a missing ffcv on CUDA devices.
    Raises ValueError where --loader ffcv or dali is asked for and cannot be had.
    """
    if config.loader == "pil":
        return "pil", "pil, as asked for"
    if config.loader == "dali":
        if problem := dali_problem():
            raise ValueError(f"--loader dali: {problem}")
        return "dali", "dali, as asked for: each photo is decoded once"
    convert = f"python -m pipeline.convert {config.data} photos.beton"
    if config.loader == "ffcv" and not is_beton(config.data):
        raise ValueError(f"--loader ffcv reads .beton files, make one: {convert}")
    problem = ffcv_problem()
    if config.loader == "ffcv" and problem:
        raise ValueError(f"--loader ffcv: {problem}")
    if problem and device.type == "cuda" and not dali_problem():
        by = "by nvJPEG" if choose_crops(config, "dali", device) == "gpu" else "on the CPU"
        return "dali", f"dali: each photo is decoded once, {by}; {problem}"
    if not is_beton(config.data):
        return "pil", f"pil, the slow one, as the photos are in no .beton file; faster: {convert}"
    if problem:
        return "pil", f"pil, slower than ffcv: {problem}"
    where = choose_crops(config, "ffcv", device).upper()
    return "ffcv", f"ffcv: each photo is decoded once, and cut on the {where}"


def choose_crops(config: PipelineConfig, kind: str, device: torch.device) -> str:
    """Where loader `kind` cuts views: 'gpu' or 'cpu'. Raises ValueError where --crops-on gpu is
    asked for and cannot be had."""
    able = device.type == "cuda" and kind != "pil"
    if config.crops_on == "gpu" and not able:
        why = "the pil loader cuts on the CPU" if kind == "pil" else f"the device is {device.type}"
        raise ValueError(f"--crops-on gpu: {why}")
    return "gpu" if able and config.crops_on != "cpu" else "cpu"


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
        self.photos = open_photos(config.data)
        self.steps_per_epoch = steps_per_epoch(len(self.photos), config.batch_size, world_size)
        self.kind, self.reason = choose_loader(config, device)
        self.crops_on = choose_crops(config, self.kind, device)
        self._config, self._device = config, device
        self._rank, self._world_size = rank, world_size
        self._mean = torch.tensor(config.mean, device=device)
        self._std = torch.tensor(config.std, device=device)
        views = config.views()
        self._replacements = Replacements(self.photos, views, config.seed)
        workers = config.workers or cores()
        shared = (config.data, views, config.global_crops_number)
        ahead = (config.seed, config.batches_ahead, self._replacements)
        self._cutter: Cutter
        if self.kind == "ffcv" and self.crops_on == "gpu":
            self._cutter = self._gpu_feed(workers)
        elif self.kind == "ffcv":
            from ibeton.pipeline.loaders.ffcv import FfcvCrops  # an optional package

            self._cutter = FfcvCrops(*shared, config.batch_size, workers, *ahead)
        elif self.kind == "dali":
            from ibeton.pipeline.loaders.dali import DaliCrops  # likewise

            here = (self.photos, views, config.global_crops_number)
            decoder = device if self.crops_on == "gpu" else torch.device("cpu")
            finish = (decoder, config.mean, config.std)
            self._cutter = DaliCrops(*here, config.batch_size, workers, *ahead, *finish)
        else:
            from ibeton.pipeline.loaders.pil import PilCrops

            self._cutter = PilCrops(*shared, workers, *ahead)

    def _gpu_feed(self, workers: int) -> Cutter:
        """Decoded by FFCV's threads, cut on the GPU."""
        from ibeton.pipeline.crops.gpu import GpuCropper
        from ibeton.pipeline.loaders.ffcv_pixels import FfcvPixels
        from ibeton.pipeline.loaders.gpu_stream import GpuFeed

        config, views, device = self._config, self._config.views(), self._device
        room = (config.batch_size, workers, config.batches_ahead)
        source = FfcvPixels(config.data, *room, self._replacements, pinned=True)
        look = (config.mean, config.std, device, torch.float32)
        cropper = GpuCropper(views, config.global_crops_number, *look)
        return GpuFeed(source, views, config.seed, cropper, device)

    @property
    def unreadable(self) -> dict[int, str]:
        """Photos that could not be decoded so far: index -> name and reason."""
        return self._replacements.unreadable

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from step `first_step` on, each on the device."""
        config = self._config
        order = epoch_order(len(self.photos), config.seed, epoch)
        batches = rank_batches(order, config.batch_size, self._rank, self._world_size, first_step)
        for wanted, crops in zip(batches, self._cutter.batches(epoch, batches.copy()), strict=True):
            yield self._finish(epoch, wanted, crops)

    def _finish(self, epoch: int, wanted: np.ndarray, crops: Crops | DeviceCrops) -> Batch:
        config = self._config
        global_crops, local_crops = crops.global_crops, crops.local_crops
        if isinstance(crops, Crops):
            with stage("copy"):
                global_crops = normalized(global_crops, self._mean, self._std)
                local_crops = normalized(local_crops, self._mean, self._std)
        cells = config.global_crops_size // config.patch_size
        with stage("mask"):
            masks = draw_masks(
                self.masks, config.seed, epoch, wanted, config.global_crops_number, (cells, cells)
            )
        used = crops.indices.clone()
        return Batch(
            global_crops=global_crops,
            local_crops=local_crops,
            masks=torch.from_numpy(masks),
            labels=torch.from_numpy(self.photos.labels[used.numpy()]),
            indices=used,
        )

    def close(self) -> None:
        """End threads and worker processes."""
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
