"""FFCV's epochs over our own batches, for operations of ours.

What is closed here of FFCV 1.0.2: an exception in its thread left the consumer waiting for ever, an
epoch left early leaked its thread and buffers, and its loader changed torch's number of threads.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from queue import Empty
from typing import Any

import numba
import numpy as np
import torch
from ffcv.loader import Loader as FfcvLoader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.pipeline_spec import PipelineSpec

from ibeton.stages import work

# Compiled operations see nothing but the batch's indices, so the epoch travels in their upper bits.
EPOCH_BITS = np.uint64(40)
INDEX_MASK = np.uint64((1 << 40) - 1)

# For compiled code: writes the monotonic clock's seconds and nanoseconds, int64 [2], to an address.
read_clock = ctypes.CDLL(None).clock_gettime
read_clock.argtypes, read_clock.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_int
MONOTONIC = time.CLOCK_MONOTONIC
# Compiled code reads a byte a page of a photo, so that the wait for the disk is no part of decode.
PAGE = 4096

_WAIT_S = 0.5  # how often a waiting consumer looks whether the loader thread lives

Memory = tuple[np.ndarray, ...]


def open_loader(
    path: str, operation: Operation, batch_size: int, workers: int, batches_ahead: int
) -> FfcvLoader:
    """FFCV's loader of the photos in `path` with `operation` on their stored bytes."""
    threads = torch.get_num_threads()
    try:
        return FfcvLoader(
            path,
            batch_size,
            num_workers=min(workers, numba.config.NUMBA_NUM_THREADS),
            os_cache=True,
            pipelines={"image": PipelineSpec("image", operation), "label": None},
            batches_ahead=batches_ahead,
        )
    finally:
        torch.set_num_threads(threads)  # FFCV sets its own number for the whole process


def note_times(times: np.ndarray, stages: tuple[str, ...], workers: int) -> None:
    """Add a batch to `stages.work`: what `read_clock` wrote before the first of `stages` and after
    each, int64 [B, 1 + stages, 2]."""
    nanoseconds = times[..., 0] * 1_000_000_000 + times[..., 1]
    for name, spent in zip(stages, np.diff(nanoseconds).sum(axis=0), strict=True):
        work.add(name, float(spent) / 1e9, len(times), workers)


class Epoch(EpochIterator):
    """An iterator over what the operation makes of each batch, made to tell of its errors and to
    end when it is left. Its results lie in slots: consume one before asking for the next.

    `batches` are sample indices int64 [steps, B]. `place` may give the operation other memory than
    FFCV allocated, before the thread starts: a tuple of arrays [slots, B, ...] for another.
    """

    def __init__(
        self,
        loader: FfcvLoader,
        epoch: int,
        batches: np.ndarray,
        place: Callable[[Memory], Memory] = lambda memory: memory,
    ) -> None:
        self.failure: BaseException | None = None
        self._place = place
        keys = batches.astype(np.uint64) | (np.uint64(epoch) << EPOCH_BITS)
        super().__init__(loader, keys.reshape(-1))

    def start(self) -> None:
        memory = self.memory_allocations["operation"]
        for node, arrays in memory.items():
            if arrays is not None:
                memory[node] = self._place(arrays)
        super().start()

    def run(self) -> None:
        try:
            numba.set_num_threads(self.loader.num_workers)
            for number, keys in enumerate(self.iter_ixes):
                slot = number % (self.loader.batches_ahead + 2)
                result = self.run_pipeline(number, keys, slot, None)
                if not self._hand_over((slot, result)):
                    return
            self._hand_over(None)
        except BaseException as error:  # whatever it was, the consumer must hear of it
            self.failure = error

    def _hand_over(self, item: object) -> bool:
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=_WAIT_S)
                return True
            except Exception:  # queue.Full: look at the event again
                continue
        return False

    def __next__(self) -> Any:
        while True:
            try:
                item = self.output_queue.get(timeout=_WAIT_S)
                break
            except Empty:
                failure = self.failure
                if failure is not None:
                    raise RuntimeError(f"the ffcv loader failed: {failure!r}") from failure
                if not self.is_alive():
                    raise RuntimeError("the ffcv loader's thread died without a word") from None
        if item is None:
            raise StopIteration
        (result,) = item[1]
        return result

    def stop(self) -> None:
        """End the thread and let go of its buffers; an epoch may be left at any batch."""
        self.terminate_event.set()
        if threading.current_thread() is not self:
            self.join()
        self.close()
        self.memory_allocations: dict[Any, Any] = {}
