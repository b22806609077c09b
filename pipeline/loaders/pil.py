"""The published recipe: Pillow and torchvision in worker processes, one photo at a time.

Slow by nature (twelve separate crops and a dozen passes each), and needing nothing but Pillow: the
yardstick for the other loaders, and the one that is there when they are not.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ibeton.pipeline.batch import Crops
from ibeton.pipeline.crops.reference import cut_views_reference
from ibeton.pipeline.loaders.replacements import Replacements
from ibeton.pipeline.sampling.draws import ViewSpec, draw_views
from ibeton.pipeline.store.decode import UnreadablePhoto
from ibeton.pipeline.store.photos import Photos, open_photos
from ibeton.stages import work

STAGES = ("read", "decode", "crop")
# Global views, local views, the photo used, unreadable ones, seconds of each of STAGES.
Sample = tuple[np.ndarray, np.ndarray, int, dict[int, str], np.ndarray]
Notes = tuple[dict[int, str], np.ndarray]  # the last two, of a batch


class _Views(Dataset):
    """Sample (epoch, index) -> its views; each worker opens the photos for itself."""

    def __init__(self, path: str, views: list[ViewSpec], global_views: int, seed: int) -> None:
        self._path = path
        self._views = views
        self._global_views = global_views
        self._seed = seed
        self._replacements: Replacements | None = None

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        if self._replacements is None:
            self._photos: Photos = open_photos(self._path)
            self._replacements = Replacements(self._photos, self._views, self._seed)
        times = [time.perf_counter()]
        with suppress(UnreadablePhoto):  # a byte a page: what follows finds the rest in memory
            np.frombuffer(self._photos.photo_bytes(index), np.uint8)[::4096].max(initial=0)
        times.append(time.perf_counter())
        used, pixels = self._replacements.readable(index)
        times.append(time.perf_counter())
        draws = draw_views(self._views, self._seed, epoch, index, *pixels.shape[:2])
        views = cut_views_reference(
            Image.fromarray(pixels), draws, [view.size for view in self._views]
        )
        unreadable = dict(self._replacements.unreadable) if used != index else {}
        global_crops, local_crops = (
            _stack(some) for some in (views[: self._global_views], views[self._global_views :])
        )
        times.append(time.perf_counter())
        return global_crops, local_crops, used, unreadable, np.diff(times)


def _stack(views: list[np.ndarray]) -> np.ndarray:
    """Views uint8 [S, S, 3] -> [V, 3, S, S]."""
    return np.stack([view.transpose(2, 0, 1) for view in views] or [np.empty((3, 1, 1), np.uint8)])[
        : len(views)
    ]


def _collate(samples: list[Sample]) -> tuple[Crops, Notes]:
    global_crops, local_crops, used, unreadable, times = zip(*samples, strict=True)
    crops = Crops(
        torch.from_numpy(np.stack(global_crops)),
        torch.from_numpy(np.stack(local_crops)),
        torch.tensor(used, dtype=torch.int64),
    )
    lost = {index: reason for part in unreadable for index, reason in part.items()}
    return crops, (lost, np.sum(times, axis=0))


class _Keys:
    """Batches of (epoch, index); set anew before each epoch, as the workers outlive epochs."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class PilCrops:
    """Crops of a folder, a tar or a .beton file, cut by Pillow in worker processes."""

    def __init__(
        self,
        path: str,
        views: list[ViewSpec],
        global_views: int,
        workers: int,
        seed: int,
        batches_ahead: int,
        replacements: Replacements,
    ) -> None:
        self._keys = _Keys()
        self._replacements = replacements
        self._loader = DataLoader(
            _Views(path, views, global_views, seed),
            batch_sampler=self._keys,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_collate,
            persistent_workers=True,
            prefetch_factor=batches_ahead,
            # numba's thread pools do not survive a fork.
            multiprocessing_context="forkserver",
        )

    def batches(self, epoch: int, batches: np.ndarray) -> Iterator[Crops]:
        """Crops of `batches` (sample indices int64 [steps, B]) with the draws of `epoch`."""
        self._keys.batches = [[(epoch, int(index)) for index in batch] for batch in batches]
        for crops, (unreadable, times) in self._loader:
            for index, reason in unreadable.items():
                self._replacements.take_over(index, reason)
            for name, spent in zip(STAGES, times, strict=True):
                work.add(name, float(spent), len(crops.indices), self._loader.num_workers)
            yield crops

    def close(self) -> None:
        """End the worker processes."""
        iterator: Any = self._loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None
