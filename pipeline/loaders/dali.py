"""Photos of folders, tars and .beton files through DALI: each is decoded once.

    read    bytes of a batch, two batches ahead         threads of ours
    decode  plain JPEGs by DALI, a batch ahead          threads of DALI, or the GPU
            anything else by Pillow, while reading
    cut     pixels -> all views, by our own draws       threads of ours, or the GPU

One thread runs this, `batches_ahead` batches ahead of the training. DALI's own crops and colors are
not used, as they are not the published ones.
"""

import logging
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ibeton.pipeline.batch import BatchPlan, Crops, Decoded
from ibeton.pipeline.crops.cpu import cut_views
from ibeton.pipeline.loaders.context import Cutter, LoaderContext, PhotoSource
from ibeton.pipeline.loaders.dali_decode import DaliDecoder
from ibeton.pipeline.loaders.read_ahead import ahead
from ibeton.pipeline.sampling.draws import draw_batch, spec_table, stack_shape
from ibeton.pipeline.store.beton import BetonReader
from ibeton.pipeline.store.decode import UnreadablePhoto
from ibeton.pipeline.store.jpeg import plain_jpeg_size
from ibeton.pipeline.store.turbojpeg import ends_early
from ibeton.stages import work

log = logging.getLogger(__name__)

_READ_AHEAD = 2  # batches


class Read(NamedTuple):
    """The photo used, and its JPEG bytes uint8 [n] for DALI or its pixels uint8 [H, W, 3]."""

    photo: int
    data: np.ndarray


class DaliPixels(PhotoSource):
    """Reads and decodes the photos of each planned batch on `context.device`."""

    def __init__(self, context: LoaderContext) -> None:
        self._ahead = context.config.batches_ahead
        self._photos, self._replacements = context.photos, context.replacements
        self._workers = context.workers
        self._decoder = DaliDecoder(context.device, context.config.batch_size, context.workers)
        self._complete = bytearray(len(context.photos))  # 1: known to be
        self._refused: set[int] = set()  # photos that look fine, but DALI does not decode them

    def stream(
        self, plans: Iterator[BatchPlan]
    ) -> Generator[tuple[BatchPlan, Decoded], None, None]:
        """The photos of each planned batch, `batches_ahead` batches ahead."""

        def decoded() -> Generator[tuple[BatchPlan, Decoded], None, None]:
            with _threads(self._workers) as pool:
                yield from self.decoded(pool, plans)

        with closing(ahead(decoded(), self._ahead)) as batches:
            yield from batches

    def decoded(
        self, pool: Executor, plans: Iterator[BatchPlan]
    ) -> Generator[tuple[BatchPlan, Decoded], None, None]:
        """Batch by batch; DALI has the next one while the consumer works on this one."""
        under_way: tuple[BatchPlan, list[Read]] | None = None
        try:
            for step in chain(self._read(pool, plans), [None]):
                done = self._finish(under_way[1]) if under_way else None
                if step is not None:
                    self._decoder.start([read.data for read in step[1] if read.data.ndim == 1])
                if under_way is not None and done is not None:
                    yield under_way[0], done
                under_way = step
        finally:
            self._decoder.abandon()

    def _read(
        self, pool: Executor, plans: Iterator[BatchPlan]
    ) -> Iterator[tuple[BatchPlan, list[Read]]]:
        waiting: deque[tuple[BatchPlan, Iterator[Read]]] = deque()
        for plan in plans:
            waiting.append((plan, pool.map(self._read_one, plan.indices.tolist())))
            if len(waiting) > _READ_AHEAD:
                first, reads = waiting.popleft()
                yield first, list(reads)
        for first, reads in waiting:
            yield first, list(reads)

    def _read_one(self, index: int) -> Read:
        if index not in self._refused:
            with suppress(UnreadablePhoto):  # Pillow's turn to say so
                began = time.perf_counter()
                data = self._photos.photo_bytes(index)
                work.add("read", time.perf_counter() - began, 1, self._workers)
                if self._is_for_dali(index, data) and self._is_complete(index, data):
                    return Read(index, np.frombuffer(data, np.uint8))
        return Read(*self._replacements.readable(index))  # it, or the next one that can be read

    def _is_for_dali(self, index: int, data: bytes | memoryview) -> bool:
        """A JPEG without surprises and, in a .beton file, of the size noted there."""
        size = plain_jpeg_size(data)
        if size is not None and isinstance(self._photos, BetonReader):
            return size == (self._photos.heights[index], self._photos.widths[index])
        return size is not None

    def _is_complete(self, index: int, data: bytes | memoryview) -> bool:
        """Whether the compressed data reach to the photo's end, checked once."""
        if not self._complete[index] and not ends_early(data):
            self._complete[index] = 1
        return bool(self._complete[index])

    def _finish(self, batch: list[Read]) -> Decoded:
        indices: list[int] = []
        photos: list[Tensor] = []
        began = time.perf_counter()
        by_dali = iter(self._decoder.finish())
        # The wait for DALI, which reports no times. If decoding limits, that is all of its time.
        work.add("decode", time.perf_counter() - began, len(batch), workers=1, shared=False)
        for index, data in batch:
            pixels = next(by_dali) if data.ndim == 1 else torch.from_numpy(data)
            if pixels is None:
                if index not in self._refused:  # else it had been read before
                    log.warning("DALI refuses %s, Pillow takes it", self._photos.name(index))
                self._refused.add(index)
                index, data = self._replacements.readable(index)
                pixels = torch.from_numpy(data)
            indices.append(index)
            photos.append(pixels)
        heights, widths = np.array([photo.shape[:2] for photo in photos], np.int64).T.copy()
        sizes = 3 * heights * widths
        offsets = np.cumsum(sizes) - sizes
        return Decoded(photos, offsets, heights, widths, torch.tensor(indices))


class DaliCrops(Cutter):
    """Views cut on the CPU, by threads beside DALI's."""

    def __init__(self, context: LoaderContext) -> None:
        self._context, self._pixels = context, DaliPixels(context)
        self._specs = spec_table(context.views)
        self._shapes = [stack_shape(views) for views in context.split()]

    def stream(self, plans: Iterator[BatchPlan]) -> Generator[tuple[BatchPlan, Crops], None, None]:
        """The views of each planned batch, `batches_ahead` batches ahead."""
        with closing(ahead(self._cut(plans), self._context.config.batches_ahead)) as batches:
            yield from batches

    def _cut(self, plans: Iterator[BatchPlan]) -> Generator[tuple[BatchPlan, Crops], None, None]:
        workers, seed = self._context.workers, self._context.config.seed
        with _threads(workers) as pool:
            for plan, photos in self._pixels.decoded(pool, plans):
                shapes = photos.heights, photos.widths
                draws = draw_batch(self._specs, seed, plan.epoch, plan.indices, *shapes)
                views = [np.empty((len(draws), *shape), np.uint8) for shape in self._shapes]
                spent = sum(pool.map(_cut_timed, photos.parts, draws, *views))
                work.add("crop", spent, len(draws), workers)
                global_crops, local_crops = (torch.from_numpy(some) for some in views)
                yield plan, Crops(global_crops, local_crops, photos.indices)


def _cut_timed(
    photo: Tensor, draws: np.ndarray, global_out: np.ndarray, local_out: np.ndarray
) -> float:
    """Cut one photo; the seconds it took."""
    began = time.perf_counter()
    cut_views(photo.numpy(), draws, global_out, local_out)
    return time.perf_counter() - began


class _threads(ThreadPoolExecutor):
    """A pool that cancels pending jobs at the end of the block."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers, "ibeton-dali")

    def __exit__(self, *raised: object) -> None:
        self.shutdown(cancel_futures=True)
