"""JPEGs decoded on the GPU by nvJPEG, beside CPU threads that take the rest of each batch.

nvJPEG's pixels are not exactly libjpeg's, and hardware decoders have been seen to skip a photo
without an error. So a photo goes to the GPU only after a CPU thread has decoded it once. By then
damaged and unusual ones are known, and stay with the CPU; of the others the CPU has left the means
of a few rows, with which every later decode is compared.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ibeton.pipeline.store.beton import JPG, BetonReader
from ibeton.pipeline.store.decode import UnreadablePhoto
from ibeton.pipeline.store.jpeg import MAX_PIXELS
from ibeton.pipeline.store.photos import turbo_pixels

ROWS, _COLUMNS = 8, 16  # compared pixels of a photo
# Levels between row means. Without fancy upsampling and with the fast DCT they move by less than 5
# on 300 photos of ImageNet; no two of these photos are closer than 11.
_FAR = 8
_NEW, _WHOLE, _CPU_ONLY = range(3)  # states of a photo
_TRIAL = 64  # photos
_RECENT = 0.1  # weight of the latest batch in a rate


class GpuPhotos(NamedTuple):
    """What became of some photos on the GPU. Those that are not good are the CPU's from then on."""

    pixels: Tensor  # uint8 [bytes], on the device
    offsets: np.ndarray  # int64 [B]; photo b is [H, W, 3] from that byte on
    good: np.ndarray  # bool [B]


class NvJpeg:
    """nvJPEG through torchvision."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, jpegs: list[Tensor]) -> list[Tensor]:
        """uint8 [bytes] each, on the CPU -> uint8 [3, H, W] each, on the device. Raises
        RuntimeError if any of them cannot be decoded."""
        from torchvision.io import ImageReadMode, decode_jpeg

        return decode_jpeg(jpegs, ImageReadMode.RGB, self.device)


def nvjpeg_problem(device: torch.device) -> str:
    """Why nvJPEG cannot be used on `device`, and what to install; empty if it can."""
    if device.type != "cuda":
        return "needs an NVIDIA GPU and a CUDA build of torch"
    import torchvision
    from torchvision.io import encode_jpeg

    try:
        NvJpeg(device)([encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))])
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return (
            f"torchvision {torchvision.__version__} cannot decode on the GPU ({reason});"
            " install the CUDA build of torchvision that belongs to this torch"
        )
    return ""


def gpu_share(gpu_rate: float, cpu_rate: float) -> float:
    """The share of photos with which a GPU and CPU threads of these rates finish together."""
    return gpu_rate / (gpu_rate + cpu_rate)


def row_means(
    pixels: Tensor, offsets: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """Means of sampled pixels in ROWS rows of each photo, float32 [B, ROWS]. Photo b is
    [heights[b], widths[b], 3] from byte offsets[b] of `pixels` on. Waits for the device."""
    rows = (2 * np.arange(ROWS) + 1) * heights[:, None] // (2 * ROWS)  # [B, ROWS]
    columns = (2 * np.arange(_COLUMNS) + 1) * widths[:, None] // (2 * _COLUMNS)  # [B, COLUMNS]
    places = rows[:, :, None] * widths[:, None, None] + columns[:, None]
    first = torch.from_numpy(offsets[:, None, None] + 3 * places).to(pixels.device)
    sampled = torch.stack([pixels[first + channel] for channel in range(3)])
    return sampled.float().mean(dim=(0, -1)).cpu().numpy()


class GpuDecoding:
    """Which photos of a .beton file a GPU decodes, how many of a batch, and whether it did.

    `cpu_rate`, `gpu_rate`: photos/s of all CPU threads together and of the GPU, kept up to date.
    """

    def __init__(self, reader: BetonReader, decoder: NvJpeg) -> None:
        self._reader, self._decoder = reader, decoder
        self._state = np.where(reader.modes == JPG, _NEW, _CPU_ONLY).astype(np.uint8)
        self._state[reader.heights.astype(np.int64) * reader.widths > MAX_PIXELS] = _CPU_ONLY
        self._rows = np.zeros((len(reader), ROWS), np.uint8)
        self.cpu_rate = self.gpu_rate = 1.0
        on_gpu = decoder.device.type == "cuda"
        self._stream = torch.cuda.Stream(decoder.device) if on_gpu else None

    def chosen(self, indices: np.ndarray) -> np.ndarray:
        """Which photos of a batch the GPU decodes, bool [B]."""
        able = self._state[indices] == _WHOLE
        count = round(len(indices) * gpu_share(self.gpu_rate, self.cpu_rate))
        return able & (np.cumsum(able) <= count)

    def remember(self, indices: np.ndarray, pixels: Tensor, offsets: np.ndarray) -> None:
        """Note what the photos `indices` look like, which a CPU has decoded: photo i from byte
        offsets[i] of `pixels` on."""
        new = self._state[indices] == _NEW
        if new.any():
            photos = indices[new]
            self._rows[photos] = np.rint(row_means(pixels, offsets[new], *self._sides(photos)))
            self._state[photos] = _WHOLE

    def decode(self, indices: np.ndarray) -> GpuPhotos:
        """Decode the photos `indices` [B] and compare them with what is remembered of them."""
        heights, widths = self._sides(indices)
        ends = np.cumsum(3 * heights * widths)
        offsets = ends - 3 * heights * widths
        good = np.zeros(len(indices), bool)
        # A stream of its own: the training's is not held up, nor waited for. None does nothing.
        with torch.cuda.stream(self._stream):
            pixels = torch.zeros(int(ends[-1]), dtype=torch.uint8, device=self._decoder.device)
            for i, image in enumerate(self._images(indices)):
                good[i] = image is not None and image.shape == (3, heights[i], widths[i])
                if image is not None and good[i]:
                    photo = pixels[offsets[i] : ends[i]].view(int(heights[i]), int(widths[i]), 3)
                    photo.copy_(image.permute(1, 2, 0))
            rows = row_means(pixels, offsets, heights, widths)
        good &= (np.abs(rows - self._rows[indices]) <= _FAR).all(axis=1)
        self._state[indices[~good]] = _CPU_ONLY
        return GpuPhotos(pixels, offsets, good)

    def note_rates(self, cpu: float | None, gpu: float | None) -> None:
        """Photos/s that were measured in a batch, of those that had a part in it."""
        if cpu is not None:
            self.cpu_rate += _RECENT * (cpu - self.cpu_rate)
        if gpu is not None:
            self.gpu_rate += _RECENT * (gpu - self.gpu_rate)

    def _sides(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        reader = self._reader
        return reader.heights[indices].astype(np.int64), reader.widths[indices].astype(np.int64)

    def _images(self, indices: np.ndarray) -> list[Tensor | None]:
        stored = [bytearray(self._reader.photo_bytes(i)) for i in indices.tolist()]
        try:
            return list(self._decoder([torch.frombuffer(x, dtype=torch.uint8) for x in stored]))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # of one of them, which says nothing about the others
            if len(indices) == 1:
                return [None]
            return [image for i in indices for image in self._images(np.array([i]))]

    def trial(self, workers: int) -> tuple[int, int]:
        """Measure both rates on photos from all over the file, with `workers` CPU threads. Returns
        how many the GPU decoded, and of how many that the CPU had."""
        jpegs = np.flatnonzero(self._state != _CPU_ONLY)
        some = jpegs[np.linspace(0, len(jpegs) - 1, min(_TRIAL, len(jpegs))).astype(int)]
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(self._on_cpu, some[:workers].tolist()))  # threads start
            began = time.perf_counter()
            photos = list(pool.map(self._on_cpu, some.tolist()))
            self.cpu_rate = len(some) / (time.perf_counter() - began)
        for index, photo in zip(some, photos, strict=True):
            if photo is not None:
                pixels = torch.from_numpy(photo.reshape(-1))
                self.remember(np.array([index]), pixels, np.zeros(1, np.int64))
        whole = some[self._state[some] == _WHOLE]
        if not len(whole):
            return 0, 0
        good = self.decode(whole).good  # sets things up, too
        if good.any():
            began = time.perf_counter()
            self.decode(whole[good])
            self.gpu_rate = int(good.sum()) / (time.perf_counter() - began)
        return int(good.sum()), len(whole)

    def _on_cpu(self, index: int) -> np.ndarray | None:
        try:
            return turbo_pixels(self._reader, index)
        except UnreadablePhoto:
            return None


def share_with_nvjpeg(
    wish: str, reader: BetonReader, device: torch.device, workers: int
) -> tuple[GpuDecoding | None, str]:
    """`choose_decoding` with nvJPEG; without it "auto" is silent."""
    if problem := nvjpeg_problem(device):
        if wish == "gpu":
            raise ValueError(f"--decode gpu {problem}")
        return None, ""
    return choose_decoding(wish, reader, NvJpeg(device), workers)


def choose_decoding(
    wish: str, reader: BetonReader, decoder: NvJpeg, workers: int
) -> tuple[GpuDecoding | None, str]:
    """GPU decoding if `wish` is "gpu", or "auto" and it is worth it, and the reason in one line.
    Raises ValueError if "gpu" cannot decode any photo."""
    decoding = GpuDecoding(reader, decoder)
    good, tried = decoding.trial(workers)
    if wish == "gpu" and not good:
        why = f"nvJPEG decoded none of {tried}" if tried else "there are no"
        raise ValueError(f"--decode gpu: {why} JPEGs; use --decode cpu")
    chosen, why = judged(wish, good, tried, decoding.gpu_rate, decoding.cpu_rate, workers)
    return (decoding if chosen else None), why


def judged(
    wish: str, good: int, tried: int, gpu_rate: float, cpu_rate: float, workers: int
) -> tuple[bool, str]:
    """Whether to decode on the GPU too, and why. For "auto" it must have decoded all `tried` photos
    well, and at least as fast as all CPU threads: a slower one decodes with the processors that the
    training needs."""
    threads, rate = f"{workers} threads ({cpu_rate:,.0f} images/s)", f"{gpu_rate:,.0f} images/s"
    if wish == "gpu" or (0 < tried == good and gpu_rate >= cpu_rate):
        return True, f"JPEGs are decoded by the GPU ({rate}) and {threads}"
    if not tried:
        return False, ""
    why = f"the GPU is slower ({rate})"
    if good < tried:
        why = f"nvJPEG decoded {good} of {tried} photos as libjpeg-turbo does"
    return False, f"JPEGs are decoded by {threads}: {why}"
