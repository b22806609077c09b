"""Decoded photos of a .beton file through FFCV, packed, for croppers on another device."""

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

from ibeton.pipeline.batch import Decoded
from ibeton.pipeline.loaders.ffcv_epoch import (
    INDEX_MASK,
    MONOTONIC,
    PAGE,
    Epoch,
    Memory,
    note_times,
    open_loader,
    read_clock,
)
from ibeton.pipeline.loaders.replacements import Replacements
from ibeton.pipeline.store.beton import BetonReader

STAGES = ("read", "decode")


class DecodePacked(Operation):
    """FFCV operation: JPEG or raw bytes -> pixels, photo behind photo in one buffer for a batch.

    Yields (pixels uint8 [B, room], a flat buffer in B rows, offsets int64 [B, 1] in bytes, status
    int32 [B, 1], times int64 [B, 3, 2]). A status other than 0 is libjpeg-turbo's complaint about a
    photo. Times are `read_clock`'s, before and after each of STAGES. The real buffer is put in its
    place by `FfcvPixels`, which knows the batches.
    """

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        memory = (
            *(AllocationQuery((1,), np.dtype(kind)) for kind in ("<u1", "<i8", "<i4")),
            AllocationQuery((1 + len(STAGES), 2), np.dtype("<i8")),
        )
        return replace(previous_state, jit_mode=True, shape=None, dtype=np.dtype("<u1")), memory

    def generate_code(self) -> Callable:
        jpg = IMAGE_MODES["jpg"]
        read = self.memory_read
        each = Compiler.get_iterator()
        decode_jpeg = Compiler.compile(imdecode)
        clock, monotonic = read_clock, MONOTONIC

        def decode_packed(keys, memory, metadata, storage):  # type: ignore[no-untyped-def]
            pixels, offsets, status, times = memory
            flat = pixels.reshape(-1)
            end = 0
            for i in range(len(keys)):
                field = metadata[keys[i] & INDEX_MASK]
                offsets[i, 0] = end
                end += 3 * int(field["height"]) * int(field["width"])
            for i in each(len(keys)):
                field = metadata[keys[i] & INDEX_MASK]
                clock(monotonic, times[i, 0].ctypes.data)
                data = read(field["data_ptr"], storage)
                touched = 0
                for place in range(0, len(data), PAGE):
                    touched += data[place]
                times[i, 1, 0] = touched  # or the compiler would leave the loop out
                clock(monotonic, times[i, 1].ctypes.data)
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                start = offsets[i, 0]
                photo = flat[start : start + 3 * int(height) * int(width)]
                status[i, 0] = 0
                if field["mode"] == jpg:
                    status[i, 0] = decode_jpeg(
                        data, photo, height, width, height, width, 0, 0, 1, 1, False, False
                    )
                else:
                    photo[:] = data
                clock(monotonic, times[i, 2].ctypes.data)
            return memory

        decode_packed.is_parallel = True  # type: ignore[attr-defined]
        return decode_packed


class FfcvPixels:
    """Decoded photos of a .beton file, from FFCV's threads. With `pinned` the buffers are in
    page-locked memory, from which a GPU copies while the program goes on."""

    def __init__(
        self,
        path: str,
        batch_size: int,
        workers: int,
        batches_ahead: int,
        replacements: Replacements,
        pinned: bool,
    ) -> None:
        self._loader = open_loader(path, DecodePacked(), batch_size, workers, batches_ahead)
        reader = BetonReader(path)
        self._heights = reader.heights.astype(np.int64)
        self._widths = reader.widths.astype(np.int64)
        self._replacements = replacements
        self._pinned = pinned
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._running: Epoch | None = None

    def photos(self, batches: np.ndarray) -> Iterator[Decoded]:
        """Photos of `batches` (sample indices int64 [steps, B]); they lie in slots that are used
        again, so have them copied before asking for the next."""
        self.close()
        room = self._room(batches)

        def place(memory: Memory) -> Memory:
            return self._pixels(len(memory[0]), memory[0].shape[1], room), *memory[1:]

        self._running = running = Epoch(self._loader, 0, batches, place)
        try:
            for indices, result in zip(batches, running, strict=True):
                pixels, offsets, status, times = result
                note_times(times, STAGES, self._loader.num_workers)
                heights, widths = self._heights[indices], self._widths[indices]
                used = int((3 * heights * widths).sum())
                photos = Decoded(
                    torch.from_numpy(pixels.reshape(-1)[:used]),
                    offsets[:, 0].copy(),
                    heights,
                    widths,
                    torch.from_numpy(indices),
                )
                for i in np.flatnonzero(status[:, 0]):
                    self._replace(photos, int(i))
                yield photos
        finally:
            running.stop()

    def close(self) -> None:
        """End the epoch under way, if there is one."""
        if self._running is not None:
            self._running.stop()
            self._running = None

    def _room(self, batches: np.ndarray) -> int:
        """Bytes a sample that the largest batch takes, so that no photo is padded to another."""
        sizes = 3 * self._heights * self._widths
        most = max((int(sizes[batch].sum()) for batch in batches), default=0)
        return -(-most // max(1, batches.shape[1]))

    def _pixels(self, slots: int, batch_size: int, room: int) -> np.ndarray:
        """Buffers uint8 [slots, B, room or more]; kept from one epoch to the next."""
        wanted = slots * batch_size * room
        if self._buffer.numel() < wanted:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes first
            self._buffer = torch.empty(wanted, dtype=torch.uint8, pin_memory=self._pinned)
        return self._buffer[:wanted].numpy().reshape(slots, batch_size, room)

    def _replace(self, photos: Decoded, i: int) -> None:
        """Another photo in the place of one that does not decode, behind all others."""
        index, pixels = self._replacements.readable(int(photos.indices[i]))
        photos.offsets[i] = photos.pixels.numel()
        photos.pixels = torch.cat([photos.pixels, torch.from_numpy(pixels.reshape(-1))])
        photos.heights[i], photos.widths[i] = pixels.shape[:2]
        photos.indices[i] = index
