"""Lower bounds of each stage on this machine: its bytes over the measured bandwidth, its operations
over the measured matrix rate, its JPEGs over the rate of the decoder alone."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from ibeton.model.masking import masked_patches
from ibeton.pipeline import Batch
from ibeton.pipeline.store.beton import JPG, BetonReader
from ibeton.pipeline.store.photos import Photos
from ibeton.stages import GRAPHED
from ibeton.train import Run, train_step
from ibeton.training.precision import DTYPES
from ibeton.training.timing.flops import flop_counter, matrix_rate

_PHOTOS = 64  # looked at to know the bytes and the decode of a photo
_FLOAT = 4  # bytes
Demand = dict[str, tuple[str, float]]  # stage -> which of the Peaks it needs, and how much of it


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
    return Peaks(matrix_rate(run.device, DTYPES[run.precision]), memory, link, _decode_rate(run))


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


def _decode_rate(run: Run) -> float:
    """Photos/s of the loader's decoder in one thread. Each photo counts with the best of its
    passes."""
    photos, some = run.loader.photos, _sample(run.loader.photos)
    if isinstance(photos, BetonReader):
        some = [i for i in some if photos.modes[i] == JPG]
    best = np.full(len(some), np.inf)
    for _ in range(3):
        for i, index in enumerate(some):
            begin = time.perf_counter()
            run.loader.kind.decode(photos, index)
            best[i] = min(best[i], time.perf_counter() - begin)
    return len(some) / float(best.sum()) if some else float("inf")


def _sample(photos: Photos) -> list[int]:
    """Some photos from all over the set, as classes may differ."""
    return np.linspace(0, len(photos) - 1, min(_PHOTOS, len(photos))).astype(int).tolist()


def demand_of(run: Run, batch: Batch, rates: dict[str, float]) -> Demand:
    """What each stage of a step needs, counted over one step with `batch`, which is taken.

    The loss reads logits of student and teacher and writes the student's gradient. The optimizer
    reads gradients for their norms, scales them, reads weights, gradients and two moments, and
    writes all but the gradients: ten passes. The moving average reads two and writes one.
    """
    config, photos = run.config.model, run.loader.photos
    images, views, local = batch.masks.shape[1], len(batch.global_crops), len(batch.local_crops)
    cls_rows, patch_rows = images * (3 * views + 2 * local), 3 * int(batch.masks.sum())
    logits = cls_rows * config.out_dim + patch_rows * config.patch_prototypes()
    student, teacher = (
        float(_FLOAT * sum(p.numel() for p in net.parameters()))
        for net in (run.ibot.student, run.ibot.teacher)
    )
    if isinstance(photos, BetonReader):
        sizes = [3 * int(photos.heights[i]) * int(photos.widths[i]) for i in _sample(photos)]
    else:
        sizes = [photos.pixels(i).size for i in _sample(photos)]
    pixels = images * float(np.mean(sizes))
    crops = float(batch.global_crops.numel() + batch.local_crops.numel())  # bytes as uint8
    if run.device.type == "cpu":
        copy = ("memory", crops * (1 + _FLOAT))
    else:
        copy = ("host_to_device", crops if run.loader.crops_on == "cpu" else pixels)
    return {
        **{name: ("flops", count) for name, count in _flops(run, batch, rates).items()},
        "crop": ("memory", pixels + crops),
        "copy": copy,
        "loss": ("memory", float(logits * (_FLOAT if DTYPES[run.precision] is None else 2))),
        "optimizer": ("memory", 10 * student),
        "ema": ("memory", 3 * teacher),
        "decode": ("decode", float(images)),
    }


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


def floors(demand: Demand, peaks: Peaks, workers: int) -> dict[str, float]:
    """Seconds per step below which each stage cannot go; the loader has `workers` to decode."""
    found = {name: amount / getattr(peaks, kind) for name, (kind, amount) in demand.items()}
    whole = sum(found[name] for name in GRAPHED if name in found)
    return found | {"decode": found["decode"] / workers, "graph": whole}
