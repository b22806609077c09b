"""Photos of a .beton file (FFCV's format): each is decoded once, then cut into all of its views.

Threads read, decode (libjpeg-turbo, as FFCV does) and cut in compiled code. They take photos one by
one, across the borders of batches and epochs. FFCV's own loader is not used: it decodes with the
fast DCT, hands out whole batches, so that threads wait for the slowest of them, and compiles its
loops anew at every start.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from ibeton.pipeline.batch import BatchPlan, Crops, Decoded
from ibeton.pipeline.loaders.context import LoaderContext
from ibeton.pipeline.loaders.decode_loop import STAGES, Task, stored, work_on
from ibeton.pipeline.loaders.shared_work import Job, Worker, share
from ibeton.pipeline.sampling.draws import spec_table, stack_shape
from ibeton.pipeline.store.beton import BetonReader
from ibeton.pipeline.store.decode import MAX_PIXELS
from ibeton.pipeline.store.turbojpeg import Decoder
from ibeton.stages import work

_NOTHING = np.empty(0, np.uint8)


@dataclass
class _Batch(Job):
    """A batch under way. `failed`: places in it that did not decode."""

    plan: BatchPlan
    task: Task
    failed: list[int] = field(default_factory=list)


class FfcvCrops:
    """Views cut on the CPU."""

    def __init__(self, context: LoaderContext) -> None:
        self._context, self._threads = context, _Threads(context)
        views, count = context.views, context.global_views
        self._shapes = stack_shape(views[:count]), stack_shape(views[count:])

    def stream(self, plans: Iterator[BatchPlan]) -> Generator[tuple[BatchPlan, Crops], None, None]:
        """Views of each planned batch. Consume one before asking for the next: their memory is
        used again."""
        size = self._context.batch_size
        slots = [
            tuple(np.empty((size, *shape), np.uint8) for shape in self._shapes)
            for _ in range(self._threads.slots)
        ]

        def task(number: int, plan: BatchPlan) -> Task:
            views = slots[number % len(slots)]
            zeros = np.zeros(size, np.int64)
            return _task(plan, _NOTHING, zeros, *(part[: len(plan.indices)] for part in views))

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

    def close(self) -> None:
        """Nothing outlives a stream."""


class FfcvPixels:
    """Decoded photos, packed, for croppers on another device. With `pinned`, they are in
    page-locked memory, from which a GPU copies meanwhile."""

    def __init__(self, context: LoaderContext, pinned: bool) -> None:
        self._context, self._threads, self._pinned = context, _Threads(context), pinned
        reader = self._threads.reader
        pixels = reader.heights.astype(np.int64) * reader.widths
        self._sizes = 3 * np.where(pixels > MAX_PIXELS, 0, pixels)  # larger ones are not decoded

    def stream(
        self, plans: Iterator[BatchPlan]
    ) -> Generator[tuple[BatchPlan, Decoded], None, None]:
        """Photos of each planned batch. Have them copied before asking for the next: their memory
        is used again."""
        slots = [torch.empty(0, dtype=torch.uint8) for _ in range(self._threads.slots)]

        def task(number: int, plan: BatchPlan) -> Task:
            slot, sizes = number % len(slots), self._sizes[plan.indices]
            ends = np.cumsum(sizes)
            if slots[slot].numel() < ends[-1]:  # with a margin, as growing is slow
                room = int(ends[-1] * 1.25)
                slots[slot] = torch.empty(room, dtype=torch.uint8, pin_memory=self._pinned)
            none = np.empty((len(sizes), 0, 3, 1, 1), np.uint8)
            return _task(plan, slots[slot][: int(ends[-1])].numpy(), ends - sizes, none, none)

        def note(batch: _Batch, i: int) -> None:
            batch.failed.append(i)

        with closing(self._threads.run(plans, task, note)) as batches:
            for batch in batches:
                yield batch.plan, self._decoded(batch, slots)

    def _decoded(self, batch: _Batch, slots: list[torch.Tensor]) -> Decoded:
        task, reader = batch.task, self._threads.reader
        flat = torch.from_numpy(task.pixels)
        photos = Decoded(
            parts=[flat],
            offsets=task.offsets,
            heights=reader.heights[task.indices].astype(np.int64),
            widths=reader.widths[task.indices].astype(np.int64),
            indices=torch.from_numpy(task.indices),
        )
        end = flat.numel()
        for i in sorted(batch.failed):  # others in their places, behind all of the rest
            index, pixels = self._context.replacements.readable(int(task.indices[i]))
            photos.parts.append(torch.from_numpy(pixels.reshape(-1)))
            photos.offsets[i], photos.indices[i] = end, index
            photos.heights[i], photos.widths[i] = pixels.shape[:2]
            end += pixels.size
        return photos

    def close(self) -> None:
        """Nothing outlives a stream."""


class _Threads:
    """The file, and the threads that work on its photos."""

    def __init__(self, context: LoaderContext) -> None:
        reader = context.photos
        if not isinstance(reader, BetonReader):
            raise ValueError(f"{' '.join(context.data)}: the ffcv loader reads .beton files")
        self.reader: BetonReader = reader
        # One is with the consumer, and one is being finished while the next is begun.
        self.slots = context.batches_ahead + 2
        self._context = context
        self._photos, self._specs = stored(self.reader), spec_table(context.views)

    def run(
        self,
        plans: Iterator[BatchPlan],
        make_task: Callable[[int, BatchPlan], Task],
        replace: Callable[[_Batch, int], None],
    ) -> Generator[_Batch, None, None]:
        """The batches of `plans` in order. `make_task` gets the number of the batch and its plan;
        `replace`, called from any thread, a batch and the place of a photo that does not decode."""

        def batches() -> Iterator[_Batch]:
            for number, plan in enumerate(plans):
                yield _Batch(len(plan.indices), plan, make_task(number, plan))

        @contextmanager
        def worker() -> Iterator[Worker[_Batch]]:
            with closing(Decoder()) as decoder:

                def work_on_batch(batch: _Batch) -> int:
                    return self._work(batch, decoder.handle, replace)

                yield work_on_batch

        with closing(share(batches(), worker, self._context.workers, self.slots)) as finished:
            for batch in finished:
                _note_times(batch.task.times, bool(batch.task.pixels.size), self._context.workers)
                yield batch

    def _work(self, batch: _Batch, decoder: int, replace: Callable[[_Batch, int], None]) -> int:
        finished = 0
        while True:
            done, failed = work_on(
                batch.task, self._photos, decoder, self._specs, self._context.seed
            )
            finished += done
            if failed < 0:
                return finished
            replace(batch, failed)
            finished += 1


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


def _note_times(times: np.ndarray, only_decoded: bool, workers: int) -> None:
    """Add a batch to `stages.work`."""
    nanoseconds = times[..., 0] * 1_000_000_000 + times[..., 1]
    spent = np.diff(nanoseconds).sum(axis=0)
    for name, some in zip(STAGES[:2] if only_decoded else STAGES, spent, strict=False):
        work.add(name, float(some) / 1e9, len(times), workers)
