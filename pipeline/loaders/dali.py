"""Crops through DALI, from photo folders and .beton files: each photo is decoded once.

    read    bytes of a batch, two batches ahead         threads of ours
    decode  plain JPEGs by DALI, a batch ahead          threads of DALI, or the GPU
            anything else by Pillow, while reading
    cut     pixels -> all views, by our own draws       threads of ours, or the GPU

One thread an epoch drives this, `batches_ahead` batches ahead of the training. DALI's own crops and
colors are not used: they are not the published ones.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ibeton.pipeline.batch import Crops, DeviceCrops
from ibeton.pipeline.crops.cpu import cut_views
from ibeton.pipeline.loaders.dali_decode import DaliDecoder
from ibeton.pipeline.loaders.read_ahead import ahead
from ibeton.pipeline.loaders.replacements import Replacements
from ibeton.pipeline.sampling.draws import ViewSpec, draw_batch, spec_table, stack_shape
from ibeton.pipeline.store.beton import BetonReader
from ibeton.pipeline.store.decode import UnreadablePhoto
from ibeton.pipeline.store.jpeg import plain_jpeg_size
from ibeton.pipeline.store.photos import Photos
from ibeton.stages import StageClock, work

log = logging.getLogger(__name__)

_READ_AHEAD = 2  # batches

# The photo used, and its JPEG bytes uint8 [n] for DALI or its pixels uint8 [H, W, 3].
Read = tuple[int, np.ndarray]
# The photos used, and their pixels uint8 [H, W, 3] each.
Used = tuple[list[int], list[Tensor]]


class DaliCrops:
    """Crops of a folder, a tar or a .beton file, decoded by DALI.

    Yields Crops, or DeviceCrops normalized by `mean` and `std` where `device` is a CUDA device.
    """

    def __init__(
        self,
        photos: Photos,
        views: list[ViewSpec],
        global_views: int,
        batch_size: int,
        workers: int,
        seed: int,
        batches_ahead: int,
        replacements: Replacements,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self._photos, self._replacements = photos, replacements
        self._workers, self._batches_ahead = workers, batches_ahead
        self._decoder = DaliDecoder(device, batch_size, workers)
        self._specs, self._seed = spec_table(views), seed
        self._cutter: _CpuCutter | _GpuCutter
        if device.type == "cuda":
            self._cutter = _GpuCutter(views, global_views, mean, std, device)
        else:
            self._cutter = _CpuCutter(views, global_views, workers)
        self._refused: set[int] = set()  # photos that look sound and that DALI does not decode
        self._replacing = threading.Lock()
        self._running: Generator[Crops | DeviceCrops, None, None] | None = None

    def batches(self, epoch: int, batches: np.ndarray) -> Iterator[Crops | DeviceCrops]:
        """Crops of `batches` (sample indices int64 [steps, B]) with the draws of `epoch`."""
        self.close()
        self._running = running = ahead(self._cut(epoch, batches), self._batches_ahead)
        try:
            for crops in running:
                if crops.global_crops.is_cuda:  # made on the cutter's stream, used on this one
                    for views in (crops.global_crops, crops.local_crops):
                        views.record_stream(torch.cuda.current_stream(views.device))
                yield crops
        finally:
            running.close()

    def close(self) -> None:
        """End the epoch under way, if there is one."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _cut(self, epoch: int, batches: np.ndarray) -> Generator[Crops | DeviceCrops, None, None]:
        pool = ThreadPoolExecutor(self._workers, "ibeton-dali")
        try:
            decoded = self._decode(self._read(pool, batches))
            for wanted, (used, photos) in zip(batches, decoded, strict=True):
                heights, widths = np.array([photo.shape[:2] for photo in photos], np.int64).T.copy()
                draws = draw_batch(self._specs, self._seed, epoch, wanted, heights, widths)
                yield self._cutter.cut(pool, photos, draws, torch.tensor(used))
        finally:
            self._decoder.abandon()
            pool.shutdown(cancel_futures=True)

    def _read(self, pool: Executor, batches: np.ndarray) -> Iterator[list[Read]]:
        waiting: deque[Iterator[Read]] = deque()
        for batch in batches:
            waiting.append(pool.map(self._read_one, batch.tolist()))
            if len(waiting) > _READ_AHEAD:
                yield list(waiting.popleft())
        while waiting:
            yield list(waiting.popleft())

    def _read_one(self, index: int) -> Read:
        if index not in self._refused:
            with suppress(UnreadablePhoto):  # Pillow's turn to say so
                began = time.perf_counter()
                data = self._photos.photo_bytes(index)
                # A byte a page: the wait for the disk is no part of the decode.
                np.frombuffer(data, np.uint8)[::4096].max(initial=0)
                work.add("read", time.perf_counter() - began, 1, self._workers)
                if self._is_for_dali(index, data):
                    return index, np.frombuffer(data, np.uint8)
        return self._decode_by_pillow(index)

    def _is_for_dali(self, index: int, data: bytes | memoryview) -> bool:
        """A JPEG without surprises and, in a .beton file, of the size noted there."""
        size = plain_jpeg_size(data)
        if size is not None and isinstance(self._photos, BetonReader):
            return size == (self._photos.heights[index], self._photos.widths[index])
        return size is not None

    def _decode_by_pillow(self, index: int) -> Read:
        """Pixels of photo `index`, or of the next one that can be read."""
        try:
            return index, self._photos.pixels(index)
        except UnreadablePhoto:
            with self._replacing:
                return self._replacements.readable(index)

    def _decode(self, batches: Iterator[list[Read]]) -> Iterator[Used]:
        """Batch by batch; DALI has the next one while the consumer works on this one."""
        under_way: list[Read] = []
        for batch in chain(batches, [[]]):
            done = self._finish(under_way)
            self._decoder.start([data for _, data in batch if data.ndim == 1])
            if under_way:
                yield done
            under_way = batch

    def _finish(self, batch: list[Read]) -> Used:
        used, photos = [], []
        began = time.perf_counter()
        by_dali = iter(self._decoder.finish())
        # The wait for it: DALI tells no more, and where the decode limits it is all of its time.
        if batch:
            work.add("decode", time.perf_counter() - began, len(batch), workers=1, shared=False)
        for index, data in batch:
            pixels = next(by_dali) if data.ndim == 1 else torch.from_numpy(data)
            if pixels is None:
                self._refused.add(index)
                log.warning("DALI refuses %s, Pillow takes it", self._photos.name(index))
                index, data = self._decode_by_pillow(index)
                pixels = torch.from_numpy(data)
            used.append(index)
            photos.append(pixels)
        return used, photos


class _CpuCutter:
    """Cuts the photos of a batch on the threads of a pool."""

    def __init__(self, views: list[ViewSpec], global_views: int, workers: int) -> None:
        self._workers = workers
        self._shapes = [stack_shape(views[:global_views]), stack_shape(views[global_views:])]

    def cut(
        self, pool: Executor, photos: list[Tensor], draws: np.ndarray, indices: Tensor
    ) -> Crops:
        global_crops, local_crops = (
            np.empty((len(photos), *shape), np.uint8) for shape in self._shapes
        )
        jobs = zip(photos, draws, global_crops, local_crops, strict=True)
        spent = sum(pool.map(_cut_timed, jobs))
        work.add("crop", spent, len(photos), self._workers)
        return Crops(torch.from_numpy(global_crops), torch.from_numpy(local_crops), indices)


def _cut_timed(job: tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]) -> float:
    """Cut one photo: pixels, draws, global and local views to write; the seconds it took."""
    began = time.perf_counter()
    cut_views(job[0].numpy(), *job[1:])
    return time.perf_counter() - began


class _GpuCutter:
    """Cuts the photos of a batch on a GPU, on a stream beside the training's."""

    def __init__(
        self,
        views: list[ViewSpec],
        global_views: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
    ) -> None:
        from ibeton.pipeline.crops.gpu import GpuCropper  # its Triton is on machines with a GPU

        self._device = device
        self._cropper = GpuCropper(views, global_views, mean, std, device, torch.float32)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._clock = StageClock(device)  # of that stream

    def cut(
        self, pool: Executor, photos: list[Tensor], draws: np.ndarray, indices: Tensor
    ) -> DeviceCrops:
        heights, widths = np.array([photo.shape[:2] for photo in photos], np.int64).T
        ends = np.cumsum(3 * heights * widths)
        with torch.cuda.stream(self._stream):
            self._clock.start()
            self._clock.enter("copy")
            pixels = torch.cat([photo.to(self._device).reshape(-1) for photo in photos])
            self._clock.leave()
            self._clock.enter("crop")
            views = self._cropper.cut(pixels, ends - 3 * heights * widths, heights, widths, draws)
            self._clock.leave()
            spent = self._clock.lap().seconds()  # waits for the stream, which comes anyway
        for name in ("copy", "crop"):
            work.add(name, spent[name], len(photos), workers=1, shared=False)
        if self._stream is not None:
            self._stream.synchronize()  # any stream may read the views, and DALI has its memory
        return DeviceCrops(*views, indices)
