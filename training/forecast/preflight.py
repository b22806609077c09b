"""Before the first step: will it fit, how long will it take, what will limit. It only informs."""

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ibeton.training.forecast.estimate import FULL, HALF, StepShape, step_shape, weights_of
from ibeton.training.forecast.memory import checkpoint_bytes, cpu_bytes, gpu_bytes, largest_batch
from ibeton.training.forecast.photo_cost import SHARED_CORES, PhotoCost, photo_cost
from ibeton.training.forecast.projection import (
    Forecast,
    LoaderCost,
    forecast,
    hours,
    measured_rates,
)
from ibeton.training.run import Run
from ibeton.training.timing.speed import cores_a_process
from ibeton.workers import cores

_WIDE = 1.25  # rates come from a second of work: hours are given so much wider on both sides
_HELD = 2.0  # as freed memory is kept (loaders/memory.py), runs on CPUs grow to twice the need


class PreflightInputs:
    """What the lines below ask of `run`, whose matrix products are of `dtype` (None: float32)."""

    def __init__(self, run: Run, dtype: torch.dtype | None) -> None:
        self.run, self.dtype, self.config = run, dtype, run.config
        self.on_gpu = run.device.type == "cuda"
        self.weights = weights_of(run.ibot.student, run.ibot.teacher)

    def shape(self) -> StepShape:
        """The step of one process. Raises ValueError for models that are not estimated."""
        width = FULL if self.dtype is None else HALF
        shape = step_shape(self.config, self.weights, width, self.on_gpu)
        return replace(shape, crops=self.run.loader.crops_on == "gpu")

    @functools.cached_property
    def cost(self) -> PhotoCost:
        """Measured when it is first asked for. Raises ValueError where no photo can be read."""
        loader, data = self.run.loader, self.config.pipeline
        return photo_cost(loader.photos, data, loader.kind, cut_here=loader.crops_on == "cpu")


def preflight(run: Run, dtype: torch.dtype | None) -> str:
    """A few lines on `run`, in a few seconds; matrix products are of `dtype` (None: float32). What
    cannot be told on this machine is called unknown, with the reason: nothing is raised."""
    outlook = PreflightInputs(run, dtype)
    lines = {
        "memory": _gpu_memory if outlook.on_gpu else _cpu_memory,
        "page cache": _page_cache,
        "disk": _disk,
        "time": _time,
    }
    rows = [f"{name:<11} {_told(tell, outlook)}" for name, tell in lines.items()]
    return "\n  ".join(["Before the first step:", *rows])


def _told(tell: Callable[[PreflightInputs], str], outlook: PreflightInputs) -> str:
    try:
        return tell(outlook)
    except Exception as error:  # whatever a machine does not offer: the run goes on without
        return f"unknown: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _gpu_memory(outlook: PreflightInputs) -> str:
    run, shape = outlook.run, outlook.shape()
    free, total = torch.cuda.mem_get_info(run.device)
    others = total - free - torch.cuda.memory_reserved(run.device)  # our context among them
    sharded, photo = outlook.config.run.shard_optimizer, outlook.cost.decoded

    def need(images: int) -> float:
        parts = gpu_bytes(replace(shape, images=images), run.world_size, photo, sharded)
        return sum(parts.values()) + max(0.0, others - parts["context"])

    return gpu_line(need, shape.images, total)


def gpu_line(need: Callable[[int], float], images: int, total: float) -> str:
    """Whether steps of `images`, which take `need(images)` bytes, fit in a GPU of `total` bytes."""
    most = largest_batch(need, total)
    head = f"about {gib(need(images))} of the GPU's {gib(total)} for {images} images: "
    if images <= most:
        return f"{head}fits; the largest batch is about {most}"
    cure = "a smaller --batch-size, more --micro-steps, or --checkpoint-blocks"
    return f"{head}will not fit; the largest batch is about {most}. Give {cure}"


def _cpu_memory(outlook: PreflightInputs) -> str:
    shape, processes = outlook.shape(), outlook.run.world_size
    need = cpu_bytes(shape, processes, outlook.config.run.shard_optimizer) * _local_processes()
    return cpu_line(need, shape.images, available_memory())


def cpu_line(need: float, images: int, free: float) -> str:
    """Whether steps of `images`, which take `need` bytes, fit in `free` bytes of main memory."""
    most = _HELD * need
    cure = "; give a smaller --batch-size" if most > free else ""
    verdict = "fits" if most <= free else "may not fit" if need <= free else "will not fit"
    return (
        f"{gib(need)} to {gib(most)} more for {images} images, of {gib(free)} free: {verdict}{cure}"
    )


def _page_cache(outlook: PreflightInputs) -> str:
    path, photos = Path(outlook.config.pipeline.data), outlook.run.loader.photos
    size = path.stat().st_size if path.is_file() else len(photos) * outlook.cost.stored
    return cache_line(size, available_memory())


def cache_line(photos: float, free: float) -> str:
    """Whether the photos stay in memory between epochs."""
    if photos <= free:
        return f"{gib(photos)} of photos, {gib(free)} of memory free: read from disk once"
    return (
        f"{gib(photos)} of photos, {gib(free)} of memory free: does not fit, every epoch reads from"
        " disk; smaller photos: pipeline.convert --max-resolution"
    )


def _disk(outlook: PreflightInputs) -> str:
    options, per_epoch = outlook.config.run, outlook.run.loader.steps_per_epoch
    ends = (outlook.run.step // per_epoch, _last_step(outlook) // per_epoch)  # in epochs
    begun, ended = (e // options.keep_every if options.keep_every else 0 for e in ends)
    kept = max(0, ended - begun)  # those that are still to come
    folder = Path(options.output_dir).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    room = shutil.disk_usage(there).free
    return disk_line(checkpoint_bytes(outlook.weights), kept + max(2, options.keep_last), room)


def disk_line(checkpoint: float, kept: int, free: float) -> str:
    """Whether the checkpoints fit: `kept` in the end, and the one being written."""
    need = checkpoint * (kept + 1)
    head = f"{gib(need)} for checkpoints of {gib(checkpoint)} ({kept} kept), {gib(free)} free: "
    return head + (
        "fits" if need <= free else "will not fit; keep fewer by --keep-every, --keep-last"
    )


def _time(outlook: PreflightInputs) -> str:
    if outlook.run.step >= _last_step(outlook):
        return f"nothing left to train: {outlook.run.step:,} steps are done"
    shape = outlook.shape()
    loader = outlook.run.loader
    if loader.kind.decodes_on_gpu and loader.crops_on == "gpu":
        raise ValueError("the rate of a decoder on a GPU is not estimated; see the progress line")
    rates = measured_rates(shape, outlook.run.device, outlook.dtype)
    best = outlook.cost.loader
    slower = LoaderCost(best.decode * SHARED_CORES, best.crop * SHARED_CORES)
    at_hand = cores_a_process(cores())
    workers = outlook.config.pipeline.workers or cores()
    threads = 0 if outlook.on_gpu else torch.get_num_threads()
    both = [
        forecast(shape, rate, loader, workers, at_hand, threads)
        for rate, loader in zip(rates, (slower, best), strict=True)
    ]
    left = max(0, _last_step(outlook) - outlook.run.step) * shape.images * outlook.run.world_size
    return time_line(left, both[0], both[1], outlook.run.world_size)


def _last_step(outlook: PreflightInputs) -> int:
    """The step at which this start will end."""
    options = outlook.config.run
    last = options.epochs * outlook.run.loader.steps_per_epoch
    return min(last, options.stop_after or last)


def time_line(images: int, low: Forecast, high: Forecast, processes: int) -> str:
    """Hours for `images` over all processes, and what limits."""
    rates = low.images_per_s * processes / _WIDE, high.images_per_s * processes * _WIDE
    longest, shortest = (hours(images, rate) for rate in rates)
    sides = ", ".join(f"{name} {high.sides[name] * processes:.3g}" for name in high.sides)
    return (
        f"{duration(shortest)} to {duration(longest)} ({rates[0]:.3g} to {rates[1]:.3g} images/s);"
        f" the {high.limit} will limit (images/s of each side: {sides})"
    )


def duration(time: float) -> str:
    """Hours, in the unit that suits them."""
    if time < 1:
        return f"{60 * time:.2g} min"
    return f"{time:.3g} h" if time < 48 else f"{time / 24:.3g} days"


def gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def available_memory() -> float:
    """Bytes that programs may still take, page cache included, as Linux tells. Raises
    FileNotFoundError elsewhere."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    raise ValueError("the kernel does not say how much memory is available")


def _local_processes() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
