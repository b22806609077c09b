"""Decoded photos -> finished views on the GPU, a batch ahead of the training step."""

from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch

from ibeton.pipeline.batch import Decoded, DeviceCrops
from ibeton.pipeline.crops.gpu import GpuCropper
from ibeton.pipeline.loaders.ffcv_pixels import FfcvPixels
from ibeton.pipeline.sampling.draws import ViewSpec, draw_batch, spec_table
from ibeton.stages import StageClock, StepTiming, work


class GpuFeed:
    """Cuts the views of decoded photos on the GPU, on a stream of its own.

    While the model works on a batch, the pixels of the next one are copied and cut; the host waits
    for none of it.
    """

    def __init__(
        self,
        source: FfcvPixels,
        views: list[ViewSpec],
        seed: int,
        cropper: GpuCropper,
        device: torch.device,
    ) -> None:
        self._source, self._cropper = source, cropper
        self._specs, self._seed, self._device = spec_table(views), seed, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._clock = StageClock(device)  # of that stream
        self._laps: deque[tuple[StepTiming, int]] = deque()  # under way, and their photos

    def batches(self, epoch: int, batches: np.ndarray) -> Iterator[DeviceCrops]:
        """Finished views of `batches` (sample indices int64 [steps, B]) with the draws of `epoch`,
        ready for the stream that asks."""
        ahead: tuple[DeviceCrops, torch.cuda.Event | None] | None = None
        for wanted, decoded in zip(batches, self._source.photos(batches.copy()), strict=True):
            views, copied = self._cut(epoch, wanted, decoded)
            if ahead is not None:
                yield self._ready(*ahead)
            if copied is not None:
                copied.synchronize()  # long done; the slot that it read is about to be reused
            ahead = views, self._done()
        if ahead is not None:
            yield self._ready(*ahead)

    def close(self) -> None:
        """End the epoch under way, if there is one."""
        self._source.close()

    def _cut(
        self, epoch: int, wanted: np.ndarray, decoded: Decoded
    ) -> tuple[DeviceCrops, torch.cuda.Event | None]:
        """The views, under way, and what tells that the photos have been copied."""
        shapes = decoded.heights, decoded.widths
        draws = draw_batch(self._specs, self._seed, epoch, wanted, *shapes)
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            self._clock.start()
            self._clock.enter("copy")
            pixels = decoded.pixels.to(self._device, non_blocking=True)
            self._clock.leave()
            copied = self._done()
            self._clock.enter("crop")
            global_crops, local_crops = self._cropper.cut(pixels, decoded.offsets, *shapes, draws)
            self._clock.leave()
            self._laps.append((self._clock.lap(), len(wanted)))
        self._note_laps()
        return DeviceCrops(global_crops, local_crops, decoded.indices.clone()), copied

    def _note_laps(self) -> None:
        """Hand on the times of what the stream has done."""
        while self._laps and self._laps[0][0].done():
            lap, photos = self._laps.popleft()
            spent = lap.seconds()
            for name in ("copy", "crop"):
                work.add(name, spent[name], photos, workers=1, shared=False)

    def _done(self) -> torch.cuda.Event | None:
        """An event behind what the stream has been given so far."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def _ready(self, views: DeviceCrops, done: torch.cuda.Event | None) -> DeviceCrops:
        """The same for the current stream, which waits for the cropper's."""
        if done is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(done)
            for crops in (views.global_crops, views.local_crops):
                crops.record_stream(current)  # its memory is not free before this stream is done
        return views
