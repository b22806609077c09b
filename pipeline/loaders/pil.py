"""The published recipe: Pillow and torchvision in worker processes, one photo at a time.

Slow by design (twelve separate crops with a dozen passes each), but it needs only Pillow: the
reference for the other loaders, and the fallback if they are not installed.
"""

import hashlib
import logging
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ibeton.command import Failure, worker_failure
from ibeton.pipeline.batch import BatchPlan, Crops
from ibeton.pipeline.config import PipelineConfig
from ibeton.pipeline.crops.reference import cut_views_reference
from ibeton.pipeline.loaders.context import LoaderContext
from ibeton.pipeline.loaders.replacements import Replacements
from ibeton.pipeline.sampling.draws import draw_views
from ibeton.pipeline.store.beton import BetonReader
from ibeton.pipeline.store.decode import UnreadablePhoto
from ibeton.pipeline.store.joined import open_all
from ibeton.pipeline.store.photos import Photos
from ibeton.stages import work
from ibeton.workers import end_with_parent

log = logging.getLogger(__name__)

STAGES = ("read", "decode", "crop")
# Global views, local views, the photo used, unreadable ones, seconds of each of STAGES.
Sample = tuple[np.ndarray, np.ndarray, int, dict[int, str], np.ndarray]
Notes = tuple[dict[int, str], np.ndarray]  # the last two, of a batch
# A batch on its way to the main process: global and local crops, photos used, notes. Crops are
# tensors in shared memory, or arrays, which go through a pipe.
Sent = tuple[Any, Any, Any, Notes]


class _Views(Dataset):
    """Sample (epoch, index) -> its views. Each worker opens the photos itself; they must be those
    that the main process listed."""

    def __init__(self, config: PipelineConfig, photos: Photos) -> None:
        self._config, self._views = config, config.views()
        self._listed = _digest(photos)
        self._replacements: Replacements | None = None

    def __getitem__(self, key: tuple[int, int]) -> Sample | Exception:
        """An error is returned: torch would add the worker's traceback to its message."""
        try:
            return self._sample(*key)
        except Exception as error:
            return error

    def _sample(self, epoch: int, index: int) -> Sample:
        config = self._config
        if self._replacements is None:
            self._photos: Photos = open_all(config.data)
            if _digest(self._photos) != self._listed:
                raise Failure("the photos of --data have changed since they were listed; restart")
            self._replacements = Replacements(self._photos, self._views, config.seed, quiet=True)
        times = [time.perf_counter()]
        with suppress(UnreadablePhoto):  # what follows finds it in memory
            self._photos.photo_bytes(index)
        times.append(time.perf_counter())
        used, pixels = self._replacements.readable(index)
        times.append(time.perf_counter())
        draws = draw_views(self._views, config.seed, epoch, index, *pixels.shape[:2])
        views = cut_views_reference(
            Image.fromarray(pixels), draws, [view.size for view in self._views]
        )
        unreadable = dict(self._replacements.unreadable) if used != index else {}
        count = config.global_crops_number
        global_crops, local_crops = _stack(views[:count]), _stack(views[count:])
        times.append(time.perf_counter())
        return global_crops, local_crops, used, unreadable, np.diff(times)


def _digest(photos: Photos) -> str:
    """Of the labels, and of names or places in files: what numbers of photos stand for."""
    digest = hashlib.sha256(photos.labels.tobytes())
    if isinstance(photos, BetonReader):
        digest.update(photos.pointers.tobytes() + photos.sizes.tobytes())
    else:
        for index in range(len(photos)):
            digest.update(photos.name(index).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _stack(views: list[np.ndarray]) -> np.ndarray:
    """Views uint8 [S, S, 3] -> [V, 3, S, S]."""
    return np.stack([view.transpose(2, 0, 1) for view in views] or [np.empty((3, 1, 1), np.uint8)])[
        : len(views)
    ]


def _collate(samples: list[Sample | Exception]) -> Sent | Exception:
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
    global_crops, local_crops, used, unreadable, times = zip(*samples, strict=True)
    lost = {index: reason for part in unreadable for index, reason in part.items()}
    crops = (_shared(np.stack(global_crops)), _shared(np.stack(local_crops)))
    return *crops, np.array(used, dtype=np.int64), (lost, np.sum(times, axis=0))


def _shared(crops: np.ndarray) -> torch.Tensor | np.ndarray:
    """The crops in shared memory, or unchanged, to be sent through a pipe, if there is no room."""
    try:
        return torch.from_numpy(crops).share_memory_()
    except RuntimeError:
        return crops


class _Keys:
    """Batches of (epoch, index), replaced before each stream: the workers outlive streams."""

    def __init__(self) -> None:
        self.plans: Iterator[BatchPlan] = iter(())
        self.under_way: deque[BatchPlan] = deque()  # with the workers, oldest first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for plan in self.plans:
            self.under_way.append(plan)
            yield [(plan.epoch, index) for index in plan.indices.tolist()]


class PilCrops:
    """Views of a folder, a tar or a .beton file, cut by Pillow in worker processes."""

    def __init__(self, context: LoaderContext) -> None:
        self._keys = _Keys()
        self._warned = False
        self._replacements = context.replacements
        self._loader = DataLoader(
            _Views(context.config, context.photos),
            batch_sampler=self._keys,  # type: ignore[arg-type]
            num_workers=context.workers,
            collate_fn=_collate,
            worker_init_fn=end_with_parent,
            persistent_workers=True,
            prefetch_factor=context.config.batches_ahead,
            # numba's thread pools do not survive a fork.
            multiprocessing_context="forkserver",
        )

    def stream(self, plans: Iterator[BatchPlan]) -> Generator[tuple[BatchPlan, Crops], None, None]:
        """The views of each planned batch, `batches_ahead` batches ahead in each worker. Raises
        Failure if a worker was killed."""
        self._keys.plans, self._keys.under_way = plans, deque()
        for batch in self._received():
            if isinstance(batch, Exception):
                raise batch
            global_crops, local_crops, used, (unreadable, times) = batch
            crops = Crops(
                self._tensor(global_crops), self._tensor(local_crops), torch.from_numpy(used)
            )
            for index, reason in unreadable.items():
                self._replacements.note(index, reason)
            for name, spent in zip(STAGES, times, strict=True):
                work.add(name, float(spent), len(crops.indices), self._loader.num_workers)
            yield self._keys.under_way.popleft(), crops

    def _received(self) -> Iterator[Sent | Exception]:
        try:
            yield from self._loader
        except (ConnectionError, EOFError, RuntimeError) as error:
            raise Failure(worker_failure(error)) from error

    def _tensor(self, crops: torch.Tensor | np.ndarray) -> torch.Tensor:
        if isinstance(crops, torch.Tensor):
            return crops
        if not self._warned:
            self._warned = True
            log.warning(
                "no room in /dev/shm for a batch: pipes are used, which are slower (in Docker, give"
                " --shm-size 8g; or use --loader ffcv)"
            )
        return torch.from_numpy(crops)

    def close(self) -> None:
        """End the worker processes."""
        iterator: Any = self._loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None
