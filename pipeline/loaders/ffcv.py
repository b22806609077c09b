"""Crops from a .beton file through FFCV: each photo is decoded once, then cut into all its views.

FFCV reads the file and runs compiled code over a batch on its threads; the decoder is ours, as that
of FFCV 1.0.2 ignores the decoder's status.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.libffcv import imdecode
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from numba import carray, cfunc, types

from ibeton.pipeline.batch import Crops
from ibeton.pipeline.compiled import SETTINGS
from ibeton.pipeline.crops.cpu import cut_views
from ibeton.pipeline.loaders.ffcv_epoch import (
    EPOCH_BITS,
    INDEX_MASK,
    MONOTONIC,
    PAGE,
    Epoch,
    note_times,
    open_loader,
    read_clock,
)
from ibeton.pipeline.loaders.replacements import Replacements
from ibeton.pipeline.sampling.draws import (
    DRAW,
    SPEC,
    ViewSpec,
    draw_sample,
    spec_table,
    stack_shape,
)

STAGES = ("read", "decode", "crop")


@cfunc(
    types.void(
        *(types.voidptr, types.int64, types.int64, types.voidptr, types.int64),
        *(types.int64, types.int64, types.int64),
        *(types.voidptr, types.int64, types.int64, types.voidptr, types.int64, types.int64),
    ),
    **SETTINGS,
)
def _draw_and_cut(  # type: ignore[no-untyped-def]
    pixels, height, width, specs, count, seed, epoch, index, large, views, size, small, rest, side
):
    """Draw and cut all views of one photo, by addresses: of pixels uint8 [height, width, 3], specs
    SPEC [count], and the views to write, uint8 [views, 3, size, size] and [rest, 3, side, side].

    FFCV compiles its loops anew at each start. A C function is called and not compiled into them,
    which with all that cropping takes would last half a minute.
    """
    draws = np.empty(count, DRAW)
    draw_sample(carray(specs, (count,), SPEC), seed, epoch, index, height, width, draws)
    cut_views(
        carray(pixels, (height, width, 3), np.uint8),
        draws,
        carray(large, (views, 3, size, size), np.uint8),
        carray(small, (rest, 3, side, side), np.uint8),
    )


class DecodeAndCut(Operation):
    """FFCV operation: JPEG or raw bytes -> one decode -> all views.

    Yields (global uint8 [B, V, 3, S, S], local uint8 [B, L, 3, s, s], status int32 [B, 1], times
    int64 [B, 4, 2]). A status other than 0 is libjpeg-turbo's complaint about a photo; its views
    are then not cut. Times are `read_clock`'s, before and after each of STAGES.
    """

    def __init__(self, views: list[ViewSpec], global_views: int, seed: int) -> None:
        super().__init__()
        self._specs = spec_table(views)
        self._seed = seed
        self._shapes = [stack_shape(views[:global_views]), stack_shape(views[global_views:])]

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        pixels = np.dtype("<u1")
        memory = (
            AllocationQuery(self._shapes[0], pixels),
            AllocationQuery(self._shapes[1], pixels),
            AllocationQuery((1,), np.dtype("<i4")),
            AllocationQuery((1 + len(STAGES), 2), np.dtype("<i8")),
        )
        return replace(previous_state, jit_mode=True, shape=None, dtype=pixels), memory

    def generate_code(self) -> Callable:
        jpg = IMAGE_MODES["jpg"]
        read = self.memory_read
        each = Compiler.get_iterator()
        decode_jpeg = Compiler.compile(imdecode)
        specs, seed = self._specs, self._seed
        (views, _, size, _), (rest, _, side, _) = self._shapes
        cut = _draw_and_cut.ctypes
        clock, monotonic = read_clock, MONOTONIC

        def decode_and_cut(keys, memory, metadata, storage):  # type: ignore[no-untyped-def]
            global_crops, local_crops, status, times = memory
            for i in each(len(keys)):
                index = keys[i] & INDEX_MASK
                epoch = keys[i] >> EPOCH_BITS
                field = metadata[index]
                clock(monotonic, times[i, 0].ctypes.data)
                data = read(field["data_ptr"], storage)
                touched = 0
                for place in range(0, len(data), PAGE):
                    touched += data[place]
                times[i, 1, 0] = touched  # or the compiler would leave the loop out
                clock(monotonic, times[i, 1].ctypes.data)
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                status[i, 0] = 0
                if field["mode"] == jpg:
                    pixels = np.empty((height, width, 3), np.uint8)
                    status[i, 0] = decode_jpeg(
                        data, pixels, height, width, height, width, 0, 0, 1, 1, False, False
                    )
                else:
                    pixels = data.reshape(height, width, 3)
                clock(monotonic, times[i, 2].ctypes.data)
                if status[i, 0] == 0:
                    cut(
                        *(pixels.ctypes.data, height, width),
                        *(specs.ctypes.data, len(specs), seed, epoch, index),
                        *(global_crops[i].ctypes.data, views, size),
                        *(local_crops[i].ctypes.data, rest, side),
                    )
                clock(monotonic, times[i, 3].ctypes.data)
            return memory

        decode_and_cut.is_parallel = True  # type: ignore[attr-defined]
        return decode_and_cut


class FfcvCrops:
    """Crops of a .beton file, cut on FFCV's threads."""

    def __init__(
        self,
        path: str,
        views: list[ViewSpec],
        global_views: int,
        batch_size: int,
        workers: int,
        seed: int,
        batches_ahead: int,
        replacements: Replacements,
    ) -> None:
        operation = DecodeAndCut(views, global_views, seed)
        self._loader = open_loader(path, operation, batch_size, workers, batches_ahead)
        self._replacements = replacements
        self._running: Epoch | None = None

    def batches(self, epoch: int, batches: np.ndarray) -> Iterator[Crops]:
        """Crops of `batches` (sample indices int64 [steps, B]) with the draws of `epoch`."""
        self.close()
        self._running = running = Epoch(self._loader, epoch, batches)
        try:
            for indices, result in zip(batches, running, strict=True):
                global_crops, local_crops, status, times = result
                note_times(times, STAGES, self._loader.num_workers)
                for i in np.flatnonzero(status[:, 0]):
                    indices[i] = self._replacements.fill(
                        int(indices[i]), epoch, global_crops[i], local_crops[i]
                    )
                yield Crops(
                    torch.from_numpy(global_crops),
                    torch.from_numpy(local_crops),
                    torch.from_numpy(indices),
                )
        finally:
            running.stop()

    def close(self) -> None:
        """End the epoch under way, if there is one."""
        if self._running is not None:
            self._running.stop()
            self._running = None
