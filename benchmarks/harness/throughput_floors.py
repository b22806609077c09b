"""What no implementation of a stage can go below on this machine: its bytes over the measured
bandwidth, its operations over the measured matrix rate, its JPEGs over the decoder alone."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ibeton.model.masking import masked_patches
from ibeton.pipeline import Batch
from ibeton.pipeline.loaders import LoaderKind
from ibeton.pipeline.store import JPG, BetonReader, Photos
from ibeton.train import DTYPES, Run, train_step
from ibeton.training.timing.flops import flop_counter, matrix_rate

_PHOTOS = 64  # looked at to know the bytes and the decode of a photo
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Peaks:
    """What the machine does at best: FLOP/s of matrix products, bytes/s of memory (read and
    written), bytes/s from host to device (memory's on a CPU), decoded photos/s of one thread."""

    flops: float
    memory: float
    host_to_device: float
    decode: float


def measure_peaks(run: Run) -> Peaks:
    """Takes about a second."""
    memory = _copy_rate(run.device, run.device)
    link = _copy_rate(torch.device("cpu"), run.device) / 2 if run.device.type == "cuda" else memory
    flops = matrix_rate(run.device, DTYPES[run.precision])
    return Peaks(flops, memory, link, _decode_rate(run.loader.photos, run.loader.kind))


def _copy_rate(source: torch.device, target: torch.device) -> float:
    """Bytes read and written per second, the best of a few passes over 128 MiB: of a copy, or of a
    product in place where it is one memory."""
    apart = source.type != target.type
    a = torch.ones(2**25, device=source, pin_memory=apart)
    b = torch.ones(2**25, device=target)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        if apart:
            b.copy_(a)
        else:
            b.mul_(1.0)
        if target.type == "cuda":
            torch.cuda.synchronize(target)
        best = min(best, time.perf_counter() - begin)
    return 2 * a.nbytes / best


def _decode_rate(photos: Photos, kind: LoaderKind) -> float:
    """Photos/s of a loader's decoder in one thread. Each photo counts with the best of its
    passes."""
    some = _sample(photos)
    if isinstance(photos, BetonReader):
        some = [i for i in some if photos.modes[i] == JPG]
    best = np.full(len(some), np.inf)
    for _ in range(3):
        for i, index in enumerate(some):
            begin = time.perf_counter()
            kind.decode(photos, index)
            best[i] = min(best[i], time.perf_counter() - begin)
    return len(some) / float(best.sum()) if some else float("inf")


def _sample(photos: Photos) -> list[int]:
    """Some photos from all over the set, as classes may differ."""
    return np.linspace(0, len(photos) - 1, min(_PHOTOS, len(photos))).astype(int).tolist()


@dataclass(frozen=True)
class Demand:
    """What the stages of a step need: operations, bytes in memory, bytes to the device, and photos
    to decode."""

    flops: dict[str, float]
    memory: dict[str, float]
    to_device: dict[str, float]
    photos: int


def demand_of(run: Run, batch: Batch, rates: dict[str, float]) -> Demand:
    """Counted over one step with `batch`, which is taken."""
    photos, loader = batch.global_crops.shape[1], run.loader
    cut_here = loader.crops_on == "cpu"
    pixels = photos * float(
        np.mean([_pixels(run.loader.photos, i) for i in _sample(run.loader.photos)])
    )
    views = float(batch.global_crops.numel() + batch.local_crops.numel())  # bytes as uint8
    memory = {"crop": pixels + views, **_model_bytes(run, batch)}
    to_device: dict[str, float] = {}
    if run.device.type == "cpu":
        memory["copy"] = views * (1 + _FLOAT)
    else:
        to_device["copy"] = views if cut_here else pixels
    return Demand(_flops(run, batch, rates), memory, to_device, photos)


def _pixels(photos: Photos, index: int) -> int:
    """Bytes of a decoded photo."""
    if isinstance(photos, BetonReader):
        return 3 * int(photos.heights[index]) * int(photos.widths[index])
    return photos.pixels(index).size


def _flops(run: Run, batch: Batch, rates: dict[str, float]) -> dict[str, float]:
    patches = masked_patches(batch.masks, run.device)
    with torch.no_grad(), flop_counter() as teacher:
        run.ibot.teacher.targets(batch.global_crops, patches.places)
    with torch.no_grad(), flop_counter() as student:
        masks = batch.masks.to(run.device)
        run.ibot.student(batch.global_crops, batch.local_crops, masks, patches.places)
    with flop_counter() as whole:
        train_step(run, batch, 0, rates)
    counts = {"teacher": teacher.get_total_flops(), "student": student.get_total_flops()}
    counts["backward"] = whole.get_total_flops() - sum(counts.values())
    return {name: float(count) for name, count in counts.items()}


def _model_bytes(run: Run, batch: Batch) -> dict[str, float]:
    """The loss reads logits of student and teacher and writes the student's gradient. The optimizer
    reads gradients for their norms, scales them, reads weights, gradients and two moments, and
    writes all but the gradients: ten passes. The moving average reads two and writes one."""
    config = run.config.model
    views, local, images = len(batch.global_crops), len(batch.local_crops), batch.masks.shape[1]
    masked = int(batch.masks.sum())
    cls_rows, patch_rows = 2 * (views + local) + views, 3 * masked
    values = images * cls_rows * config.out_dim + patch_rows * config.patch_prototypes()
    width = _FLOAT if DTYPES[run.precision] is None else 2
    weights = sum(p.numel() for p in run.ibot.student.parameters())
    teacher = sum(p.numel() for p in run.ibot.teacher.parameters())
    return {
        "loss": float(values * width),
        "optimizer": 10.0 * _FLOAT * weights,
        "ema": 3.0 * _FLOAT * teacher,
    }


def floors(demand: Demand, peaks: Peaks, workers: int) -> dict[str, float]:
    """Seconds a step below which each stage cannot go; stages without a floor are left out."""
    found: dict[str, Any] = {name: flops / peaks.flops for name, flops in demand.flops.items()}
    found |= {name: size / peaks.memory for name, size in demand.memory.items()}
    found |= {name: size / peaks.host_to_device for name, size in demand.to_device.items()}
    return found | {"decode": demand.photos / (peaks.decode * workers)}
