"""Photos of a .beton file (FFCV's format): each is decoded once, then cut into all of its views.

Threads read, decode (libjpeg-turbo, as FFCV does) and cut in compiled code. They take photos one by
one, across the borders of batches and epochs. FFCV's own loader is not used: it decodes with the
fast DCT, hands out whole batches, so that threads wait for the slowest of them, and compiles its
loops anew at every start.
"""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from ibeton.pipeline.batch import BatchPlan, Crops, Decoded
from ibeton.pipeline.loaders.context import Cutter, LoaderContext, PhotoSource
from ibeton.pipeline.loaders.decode_loop import STAGES, Stored, Task, work_on
from ibeton.pipeline.loaders.gpu_decode import GpuPhotos
from ibeton.pipeline.loaders.shared_work import Job, Worker, share
from ibeton.pipeline.sampling.draws import spec_table, stack_shape
from ibeton.pipeline.store.beton import BetonReader
from ibeton.pipeline.store.jpeg import MAX_PIXELS
from ibeton.pipeline.store.turbojpeg import Decoder
from ibeton.stages import work

_NOTHING = np.empty(0, np.uint8)


@dataclass
class _Batch(Job):
    """A batch under way. CPU threads work on `task`, its photos at `places`, and the GPU on those
    at `gpu_places`. `failed`: places that did not decode."""

    plan: BatchPlan
    task: Task
    places: np.ndarray  # int64 [B - G]
    gpu_places: np.ndarray  # int64 [G]
    on_gpu: GpuPhotos | None = None  # G photos
    gpu_seconds: float = 0.0
    failed: list[int] = field(default_factory=list)


class FfcvCrops(Cutter):
    """Views cut on the CPU."""

    def __init__(self, context: LoaderContext) -> None:
        self._context, self._threads = context, _Threads(context)
        shapes = [(context.config.batch_size, *stack_shape(views)) for views in context.split()]
        self._slots = [[np.empty(shape, np.uint8) for shape in shapes] for _ in self._threads.slots]

    def stream(self, plans: Iterator[BatchPlan]) -> Generator[tuple[BatchPlan, Crops], None, None]:
        """Views of each planned batch. Consume one before asking for the next: their memory is
        used again."""

        def task(number: int, plan: BatchPlan) -> Task:
            count, slot = len(plan.indices), self._slots[number % len(self._slots)]
            zeros = np.zeros(count, np.int64)
            return _task(plan, _NOTHING, zeros, *(part[:count] for part in slot))

        with closing(self._threads.run(plans, task, self._replace)) as batches:
            for batch in batches:
                made = batch.task
                views = torch.from_numpy(made.global_crops), torch.from_numpy(made.local_crops)
                yield batch.plan, Crops(*views, torch.from_numpy(made.indices))

    def _replace(self, batch: _Batch, i: int) -> None:
        """Cut the views of another photo, or of the same by Pillow."""
        task, fill = batch.task, self._context.replacements.fill
        index = int(task.indices[i])
        task.indices[i] = fill(index, task.epoch, task.global_crops[i], task.local_crops[i])


class FfcvPixels(PhotoSource):
    """Decoded photos, packed, for croppers on another device. For a GPU, those of the CPU are in
    page-locked memory, from which it copies meanwhile."""

    def __init__(self, context: LoaderContext) -> None:
        self._context, self._threads = context, _Threads(context)
        self._pinned = context.device.type == "cuda"
        reader = self._threads.reader
        pixels = reader.heights.astype(np.int64) * reader.widths
        self._sizes = 3 * np.where(pixels > MAX_PIXELS, 0, pixels)  # larger ones are not decoded
        # Kept from one stream to the next: decoding into fresh memory takes twice as long.
        self._slots = [torch.empty(0, dtype=torch.uint8) for _ in self._threads.slots]

    def stream(
        self, plans: Iterator[BatchPlan]
    ) -> Generator[tuple[BatchPlan, Decoded], None, None]:
        """Photos of each planned batch. Have them copied before asking for the next: their memory
        is used again."""

        def task(number: int, plan: BatchPlan) -> Task:
            slot, sizes = number % len(self._slots), self._sizes[plan.indices]
            ends, total = np.cumsum(sizes), int(sizes.sum())
            if self._slots[slot].numel() < total:  # with a margin, as growing is slow
                room = int(total * 1.25)
                self._slots[slot] = torch.empty(room, dtype=torch.uint8, pin_memory=self._pinned)
            none = np.empty((len(sizes), 0, 3, 1, 1), np.uint8)
            return _task(plan, self._slots[slot][:total].numpy(), ends - sizes, none, none)

        def note(batch: _Batch, i: int) -> None:
            batch.failed.append(int(batch.places[i]))

        with closing(self._threads.run(plans, task, note)) as batches:
            for batch in batches:
                yield batch.plan, self._decoded(batch)

    def _decoded(self, batch: _Batch) -> Decoded:
        task, reader, gpu = batch.task, self._threads.reader, self._context.gpu_decoding
        indices = batch.plan.indices.astype(np.int64)
        parts, offsets = [torch.from_numpy(task.pixels)], np.empty(len(indices), np.int64)
        offsets[batch.places] = task.offsets
        if gpu is not None:
            sound = ~np.isin(batch.places, batch.failed)
            gpu.remember(task.indices[sound], parts[0], task.offsets[sound])
        end = parts[0].numel()
        if batch.on_gpu is not None:
            offsets[batch.gpu_places] = end + batch.on_gpu.offsets
            parts.append(batch.on_gpu.pixels)
            end += batch.on_gpu.pixels.numel()
        heights = reader.heights[indices].astype(np.int64)
        widths = reader.widths[indices].astype(np.int64)
        for i in sorted(batch.failed):  # others in their places, behind all of the rest
            indices[i], pixels = self._context.replacements.readable(int(indices[i]))
            parts.append(torch.from_numpy(pixels.reshape(-1)))
            offsets[i] = end
            heights[i], widths[i] = pixels.shape[:2]
            end += pixels.size
        return Decoded(parts, offsets, heights, widths, torch.from_numpy(indices))


class _Threads:
    """The file, and the threads that work on its photos."""

    def __init__(self, context: LoaderContext) -> None:
        reader = context.photos
        assert isinstance(reader, BetonReader)
        self.reader = reader
        # One is with the consumer, and one is being finished while the next is begun.
        self.slots = range(context.config.batches_ahead + 2)
        self._context = context
        self._photos = Stored(*(getattr(reader, name) for name in Stored._fields))
        self._specs, self._seed = spec_table(context.views), context.config.seed

    def run(
        self,
        plans: Iterator[BatchPlan],
        make_task: Callable[[int, BatchPlan], Task],
        replace: Callable[[_Batch, int], None],
    ) -> Generator[_Batch, None, None]:
        """The batches of `plans` in order. `make_task` gets the number of the batch and the plan of
        its photos for the CPU; `replace`, called from any thread, a batch and the place in its task
        of a photo that does not decode."""

        def batches() -> Iterator[_Batch]:
            gpu = self._context.gpu_decoding
            for number, plan in enumerate(plans):
                on_gpu = gpu.chosen(plan.indices) if gpu else np.zeros(len(plan.indices), bool)
                task = make_task(number, BatchPlan(plan.epoch, plan.indices[~on_gpu]))
                places = np.flatnonzero(~on_gpu), np.flatnonzero(on_gpu)
                yield _Batch(len(plan.indices), plan, task, *places)

        @contextmanager
        def cpu_worker() -> Iterator[Worker[_Batch]]:
            with closing(Decoder()) as decoder:
                yield lambda batch: self._work(batch, decoder.handle, replace)

        @contextmanager
        def gpu_worker() -> Iterator[Worker[_Batch]]:
            yield self._work_on_gpu

        workers = [cpu_worker] * self._context.workers
        if self._context.gpu_decoding is not None:
            workers.append(gpu_worker)
        with closing(share(batches(), workers, len(self.slots))) as finished:
            for batch in finished:
                self._note_times(batch, len(workers))
                yield batch

    def _work(self, batch: _Batch, decoder: int, replace: Callable[[_Batch, int], None]) -> int:
        finished = 0
        while True:
            done, failed = work_on(batch.task, self._photos, decoder, self._specs, self._seed)
            finished += done
            if failed < 0:
                return finished
            replace(batch, failed)
            finished += 1

    def _work_on_gpu(self, batch: _Batch) -> int:
        gpu = self._context.gpu_decoding
        if gpu is not None and len(batch.gpu_places):
            began = time.perf_counter()
            batch.on_gpu = gpu.decode(batch.plan.indices[batch.gpu_places])
            batch.failed += batch.gpu_places[~batch.on_gpu.good].tolist()
            batch.gpu_seconds = time.perf_counter() - began
        return len(batch.gpu_places)

    def _note_times(self, batch: _Batch, workers: int) -> None:
        """Add a batch to `stages.work`. The GPU's thread counts as one more worker."""
        gpu, times = self._context.gpu_decoding, batch.task.times
        nanoseconds = times[..., 0] * 1_000_000_000 + times[..., 1]
        spent = dict(zip(STAGES, np.diff(nanoseconds).sum(axis=0) / 1e9, strict=True))
        if not batch.task.global_crops.shape[1]:
            del spent["crop"]
        for name, seconds in spent.items():
            photos = len(times)
            if name == "decode":
                seconds, photos = seconds + batch.gpu_seconds, len(batch.plan.indices)
            if photos:
                work.add(name, float(seconds), photos, workers)
        if gpu is not None:
            of_cpu = (spent["read"] + spent["decode"]) / self._context.workers
            gpu.note_rates(
                cpu=len(times) / float(of_cpu) if len(times) else None,
                gpu=len(batch.gpu_places) / batch.gpu_seconds if batch.gpu_seconds else None,
            )


def _task(
    plan: BatchPlan,
    pixels: np.ndarray,
    offsets: np.ndarray,
    global_crops: np.ndarray,
    local_crops: np.ndarray,
) -> Task:
    count = len(plan.indices)
    times = np.empty((count, 1 + len(STAGES), 2), np.int64)
    taken = np.zeros(1, np.int64)
    indices = plan.indices.astype(np.int64)  # a copy: replacements are noted in it
    return Task(plan.epoch, indices, taken, pixels, offsets, global_crops, local_crops, times)
