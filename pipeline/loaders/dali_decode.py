"""JPEG bytes -> pixels by DALI, a batch at a time: by nvJPEG on CUDA, else by libjpeg-turbo.

On the CPU its pixels are Pillow's. It fails with a whole batch if one photo is damaged; the batch
is then halved until that photo is alone.
"""

from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor


@pipeline_def
def _decoding(backend: str) -> Any:
    """The graph; `backend` is 'mixed' for a CUDA device, else 'cpu'."""
    jpegs = fn.external_source(name="jpegs", ndim=1, dtype=types.DALIDataType.UINT8)
    return fn.decoders.image(
        jpegs,
        device=backend,
        output_type=types.DALIImageType.RGB,
        adjust_orientation=False,  # the recipe ignores what EXIF says
        jpeg_fancy_upsampling=True,  # libjpeg's, and so Pillow's, on the GPU too
    )


class DaliDecoder:
    """Decodes batches of at most `batch_size` JPEGs, with `threads` threads of its own.

    `start` a batch, `finish` it, in turn; both from any one thread.
    """

    def __init__(self, device: torch.device, batch_size: int, threads: int) -> None:
        on_gpu = device.type == "cuda"
        number = torch.cuda.current_device() if on_gpu and device.index is None else device.index
        self._backend = "mixed" if on_gpu else "cpu"
        self._settings: dict[str, Any] = {
            "batch_size": batch_size,
            "num_threads": threads,
            "device_id": number if on_gpu else None,
            # One batch is under way at a time. With the dynamic executor its pixels own their
            # memory, so the next batch can start while they are in use.
            "prefetch_queue_depth": 1,
            "exec_dynamic": True,
        }
        self._pipe = self._build()
        self._jpegs: list[np.ndarray] = []

    def start(self, jpegs: list[np.ndarray]) -> None:
        """Begin to decode `jpegs`, uint8 [bytes] each, and return."""
        self._jpegs = jpegs
        if jpegs:
            self._pipe.feed_input("jpegs", jpegs)
            self._pipe.schedule_run()

    def finish(self) -> list[Tensor | None]:
        """Wait for the batch: uint8 [H, W, 3] on the device for each JPEG, or None if DALI refuses
        it."""
        jpegs, self._jpegs = self._jpegs, []
        if not jpegs:
            return []
        try:
            (images,) = self._pipe.share_outputs()
            self._pipe.release_outputs()
        except RuntimeError:
            self._pipe = self._build()  # after an error DALI takes no more batches
            return self._by_halves(jpegs)
        return [torch.from_dlpack(images[i]) for i in range(len(jpegs))]

    def abandon(self) -> None:
        """Drop the batch under way, if there is one."""
        if self._jpegs:
            self._pipe, self._jpegs = self._build(), []

    def _build(self) -> Any:
        pipe = _decoding(self._backend, **self._settings)
        pipe.build()
        return pipe

    def _by_halves(self, jpegs: list[np.ndarray]) -> list[Tensor | None]:
        """Decode a batch that failed."""
        if len(jpegs) == 1:
            return [None]
        decoded: list[Tensor | None] = []
        middle = len(jpegs) // 2
        for part in (jpegs[:middle], jpegs[middle:]):
            self.start(part)
            decoded += self.finish()
        return decoded
