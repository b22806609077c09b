"""Decoded photos -> finished views on the GPU, a batch ahead of the training step."""

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing

import torch

from ibeton.pipeline.batch import BatchPlan, Decoded, DeviceCrops
from ibeton.pipeline.crops.gpu import GpuCropper
from ibeton.pipeline.loaders.context import LoaderContext, PhotoSource
from ibeton.pipeline.sampling.draws import draw_batch, spec_table
from ibeton.stages import StageClock, StepTiming, work


class GpuCrops:
    """Cuts the views of decoded photos on the GPU, on its own stream.

    While the model works on a batch, the next one is copied and cut; the host does not wait.
    """

    def __init__(self, context: LoaderContext, source: PhotoSource) -> None:
        self._source, self._device, self._seed = source, context.device, context.config.seed
        self._specs = spec_table(context.views)
        self.cropper = GpuCropper(
            views=context.views,
            global_views=context.config.global_crops_number,
            mean=context.config.mean,
            std=context.config.std,
            device=context.device,
            dtype=torch.float32,
        )
        on_gpu = context.device.type == "cuda"
        self._stream = torch.cuda.Stream(context.device) if on_gpu else None
        self._clock = StageClock(context.device)  # of that stream
        self._timings: deque[tuple[StepTiming, int]] = deque()  # under way, and their photos

    def stream(
        self, plans: Iterator[BatchPlan]
    ) -> Generator[tuple[BatchPlan, DeviceCrops], None, None]:
        """Finished views of each planned batch, ready for the CUDA stream that asks."""
        ahead: tuple[BatchPlan, DeviceCrops, torch.cuda.Event | None] | None = None
        with closing(self._source.stream(plans)) as photos:
            for plan, decoded in photos:
                views, copied = self._cut(plan, decoded)
                done = self._event()
                if ahead is not None:
                    yield ahead[0], self._ready(*ahead[1:])
                if copied is not None:
                    copied.synchronize()  # long done; the slot that it read is about to be reused
                ahead = plan, views, done
            if ahead is not None:
                yield ahead[0], self._ready(*ahead[1:])

    def close(self) -> None:
        self._source.close()

    def _cut(self, plan: BatchPlan, photos: Decoded) -> tuple[DeviceCrops, torch.cuda.Event | None]:
        """The views, under way, and the event behind the copy of the photos."""
        shapes = photos.heights, photos.widths
        draws = draw_batch(self._specs, self._seed, plan.epoch, plan.indices, *shapes)
        with torch.cuda.stream(self._stream):  # None, on a CPU, does nothing
            self._clock.start()
            self._clock.enter("copy")
            parts = [part.to(self._device, non_blocking=True).reshape(-1) for part in photos.parts]
            pixels = parts[0] if len(parts) == 1 else torch.cat(parts)
            if self._stream is not None:
                for part in parts:  # some were made on another stream
                    part.record_stream(self._stream)
            self._clock.leave()
            copied = self._event()
            self._clock.enter("crop")
            global_crops, local_crops = self.cropper.cut(pixels, photos.offsets, *shapes, draws)
            self._clock.leave()
            self._timings.append((self._clock.lap(), len(plan.indices)))
        self._note_timings()
        return DeviceCrops(global_crops, local_crops, photos.indices.clone()), copied

    def _note_timings(self) -> None:
        """Report the times of what the stream has finished."""
        while self._timings and self._timings[0][0].done():
            timing, photos = self._timings.popleft()
            spent = timing.seconds()
            for name in ("copy", "crop"):
                work.add(name, spent[name], photos, workers=1, shared=False)

    def _event(self) -> torch.cuda.Event | None:
        """An event behind the stream's work so far."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def _ready(self, views: DeviceCrops, done: torch.cuda.Event | None) -> DeviceCrops:
        """The views for the current stream, which waits for the cropper's."""
        if done is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(done)
            for crops in (views.global_crops, views.local_crops):
                crops.record_stream(current)  # its memory is not free before this stream is done
        return views
