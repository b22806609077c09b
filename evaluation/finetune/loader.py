"""Labeled photos -> batches of training views: each photo is decoded once, its crop is cut by the
compiled cropper of pre-training, and threads do it while the device computes.

Decoding and cropping run without the GIL. What a view looks like follows from (seed, epoch, photo,
repeat) alone, so the number of threads and processes changes nothing.
"""

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ibeton.evaluation.finetune.randaugment import RandAugment
from ibeton.evaluation.frozen.features import MEAN
from ibeton.evaluation.photos import filled_batches
from ibeton.pipeline.crops import resize
from ibeton.pipeline.loaders.replacements import Replacements
from ibeton.pipeline.sampling.draws import ViewSpec, draw_views
from ibeton.pipeline.sampling.order import epoch_order
from ibeton.pipeline.store.photos import Photos
from ibeton.stages import work
from ibeton.training.timing.speed import cores_a_process
from ibeton.workers import cores


@dataclass
class Batch:
    """Training views of one process, on the CPU."""

    images: Tensor  # uint8 [b, 3, S, S]
    labels: Tensor  # int64 [b]
    indices: Tensor  # int64 [b], the photos that were used


@dataclass(frozen=True)
class ViewSettings:
    """How a training view is made: side in pixels, share of the area, RandAugment, its seed, and
    how many views of a photo a batch has."""

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    augment: str = ""
    seed: int = 0
    repeats: int = 1


class TrainingViews:
    """Pixels of a photo -> its training views of an epoch."""

    def __init__(self, settings: ViewSettings) -> None:
        self.settings = settings
        self._spec = ViewSpec(
            settings.size, settings.scale, blur_p=0.0, solarize_p=0.0, jitter_p=0.0, gray_p=0.0
        )
        self._augment = (
            RandAugment(settings.augment, settings.size, MEAN) if settings.augment else None
        )

    def cut(self, pixels: np.ndarray, index: int, epoch: int, out: np.ndarray) -> None:
        """Views of photo `index`, uint8 [H, W, 3], into out uint8 [repeats, 3, S, S]."""
        columns = resize.photo_columns(pixels)
        for repeat, view in enumerate(out):
            at = epoch * self.settings.repeats + repeat
            draw = draw_views([self._spec], self.settings.seed, at, index, *pixels.shape[:2])[0]
            box = (int(draw[name]) for name in ("top", "left", "height", "width"))
            resize.resized_crop(columns, *box, bool(draw["flip"]), view)
            if self._augment is not None:
                rng = np.random.Generator(
                    np.random.Philox(key=[self.settings.seed, at << 40 | index])
                )
                self._augment.apply(view, rng)


class Loader:
    """Batches of `batch_size` views of rank `rank` of `world_size`, epoch by epoch.

    A photo's repeats stand next to each other in a batch, so it is decoded once; the last photo's
    are cut off where they do not fit. An epoch then shows a different part of the photos, as many
    views as there are photos (published repeated augmentation spreads them over processes instead).
    Raises ValueError where not even one global batch can be filled.
    """

    def __init__(
        self,
        photos: Photos,
        settings: ViewSettings,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 0,
        pinned: bool = False,
    ) -> None:
        self.photos, self._views = photos, TrainingViews(settings)
        self.steps_per_epoch = len(photos) // (batch_size * world_size)
        if not self.steps_per_epoch:
            raise ValueError(
                f"--batch-size {batch_size * world_size} is more than the {len(photos)} photos to"
                f" train on: use at most {len(photos)}"
            )
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self.threads, self._pinned = threads or cores_a_process(cores()), pinned
        self._replacements = Replacements(photos, [], settings.seed)
        self.unreadable = self._replacements.unreadable  # so far: index -> name and reason

    def batches(self, epoch: int) -> np.ndarray:
        """Photos of this rank's batches, int64 [steps, batch_size / repeats, rounded up]."""
        settings = self._views.settings
        order = epoch_order(len(self.photos), settings.seed, epoch)
        each = -(-self._batch_size // settings.repeats)
        used = order[: self.steps_per_epoch * self._world_size * each]
        return used.reshape(self.steps_per_epoch, self._world_size, each)[:, self._rank]

    def epoch(self, epoch: int, first_step: int = 0) -> Generator[Batch, None, None]:
        """The batches of `epoch` from step `first_step` on."""
        repeats, size = self._views.settings.repeats, self._views.settings.size

        def allocate(count: int) -> Tensor:
            shape = (count, repeats, 3, size, size)
            return torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)

        make, batches = partial(self._make, epoch), self.batches(epoch)[first_step:]
        with closing(filled_batches(list(batches), allocate, make, self.threads)) as filled:
            for _, views, photos in filled:
                used = torch.tensor(photos).repeat_interleave(repeats)[: self._batch_size]
                labels = torch.from_numpy(self.photos.labels[used.numpy()])
                yield Batch(views.flatten(0, 1)[: self._batch_size], labels, used)

    def _make(self, epoch: int, rows: np.ndarray, out: np.ndarray) -> list[int]:
        """Views of photos `rows` into out [rows, repeats, 3, S, S]; the photos that were used."""
        used, decoding, cutting = [], 0.0, 0.0
        for index, views in zip(rows.tolist(), out, strict=True):
            start = time.perf_counter()
            found, pixels = self._replacements.readable(index)
            decoded = time.perf_counter()
            self._views.cut(pixels, index, epoch, views)
            used.append(found)
            decoding += decoded - start
            cutting += time.perf_counter() - decoded
        views_made = len(rows) * self._views.settings.repeats
        work.add("decode", decoding, views_made, self.threads)
        work.add("crop", cutting, views_made, self.threads)
        return used
