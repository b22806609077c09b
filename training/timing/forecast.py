"""What a run will take: page cache and disk before its first step; memory, run time and the
bottleneck from its first steps, as they were measured. It only informs."""

import shutil
from pathlib import Path

import numpy as np
import torch

from ibeton.command import amount
from ibeton.model import IBOT
from ibeton.pipeline.store.decode import UnreadablePhoto
from ibeton.training import checkpoints
from ibeton.training.run import Run
from ibeton.training.timing.speed import MUCH_WAIT, peak_memory

_LOOKED_AT = 16  # photos of a folder that are weighed
_MOMENTS = {"adamw": 2, "sgd": 1, "lars": 1}  # numbers an optimizer keeps per weight
_FLOAT = 4  # bytes


def preflight(run: Run) -> str:
    """Whether photos fit in memory and checkpoints on the disk, in two lines. What the machine
    does not tell is called unknown, with the reason: nothing is raised."""
    lines = []
    for name, tell in (("page cache", _page_cache), ("disk", _disk)):
        try:
            told = tell(run)
        except Exception as error:  # a forecast is never worth a run
            told = f"unknown: {(str(error) or type(error).__name__).splitlines()[0]}"
        lines.append(f"{name}: {told}")
    return "\n".join(lines)


def _page_cache(run: Run) -> str:
    paths, photos = list(map(Path, run.config.pipeline.data)), run.loader.photos
    if all(path.is_file() for path in paths):
        return cache_line(sum(path.stat().st_size for path in paths), available_memory())
    sizes = []
    for index in np.linspace(0, len(photos) - 1, _LOOKED_AT).astype(int).tolist():
        try:
            sizes.append(len(photos.photo_bytes(index)))
        except UnreadablePhoto:
            continue
    return cache_line(len(photos) * float(np.mean(sizes or [0])), available_memory())


def cache_line(photos: float, free: float) -> str:
    """Whether `photos` bytes stay in `free` bytes of memory between epochs."""
    head = f"{gib(photos)} of photos, {gib(free)} of memory free: "
    if photos <= free:
        return f"{head}fits in memory, so photos are read from disk only once"
    return (
        f"{head}does not fit, so every epoch reads from disk; `ibeton convert --max-resolution`"
        " makes photos smaller"
    )


def _disk(run: Run) -> str:
    options, per_epoch = run.config.run, run.loader.steps_per_epoch
    epochs = run.last // per_epoch
    stay = epochs // options.keep_every if options.keep_every else 0
    saves = max(1, epochs + (run.last // options.save_steps if options.save_steps else 0))
    rolling = min(max(options.keep_last, 2), saves)
    to_come = max(0, stay + rolling - len(checkpoints.listed(run.folder)))
    folder = run.folder.absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    size = checkpoint_bytes(run.ibot, options.optimizer)
    return disk_line(size, to_come, shutil.disk_usage(there).free)


def checkpoint_bytes(ibot: IBOT, optimizer: str) -> float:
    """Bytes of a checkpoint: student, teacher, and what the optimizer keeps."""
    student, teacher = (
        sum(p.numel() for p in network.parameters()) for network in (ibot.student, ibot.teacher)
    )
    return float(_FLOAT * (student * (1 + _MOMENTS[optimizer]) + teacher))


def disk_line(checkpoint: float, to_come: int, free: float) -> str:
    """Whether `to_come` checkpoints and the one being written fit."""
    need = checkpoint * (to_come + 1)
    stay = f"{amount(to_come, 'checkpoint')} and " if to_come else ""
    what = f"{stay}the one being written, {gib(checkpoint)} each"
    fits = "fits" if need <= free else "will not fit; keep fewer with --keep-every, --keep-last"
    return f"{gib(need)} for {what}, {gib(free)} free: {fits}"


def forecast_line(seconds: float, images_per_s: float, waiting: float, device: torch.device) -> str:
    """What is left at the measured rate, what limits, and the peak of memory so far."""
    limit = "the loader" if waiting > MUCH_WAIT else "the model"
    return (
        f"forecast from the first steps: {duration(seconds)} left at {number(images_per_s)}"
        f" images/s; {limit} limits (data wait {waiting:.0%}); memory {memory_words(device)}"
    )


def memory_words(device: torch.device) -> str:
    """The peak of this process so far, of what its device has."""
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        held = torch.cuda.max_memory_reserved(device)
        return f"{gib(peak_memory(device))} at the peak, {gib(held)} reserved of {gib(total)}"
    try:
        return f"{gib(peak_memory(device))} at the peak, {gib(available_memory())} still free"
    except (OSError, ValueError):
        return f"{gib(peak_memory(device))} at the peak"


def duration(seconds: float, beside: float = 0.0) -> str:
    """Seconds in the unit that suits them, or the longer time `beside` which they are shown."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if max(seconds, beside) >= (2 if unit == "days" else 1) * length:
            return f"{number(seconds / length)} {unit}"
    return f"{max(1, round(seconds))} s"


def number(value: float) -> str:
    """Three digits, never in powers of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def gib(size: float) -> str:
    """Bytes in GiB, small ones in MiB."""
    return f"{number(size / 2**30)} GiB" if size >= 2**30 else f"{number(size / 2**20)} MiB"


def available_memory() -> float:
    """Bytes that programs may still take, page cache included, as Linux tells. Raises
    FileNotFoundError elsewhere."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    raise ValueError("the kernel does not say how much memory is available")
