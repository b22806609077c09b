"""How fast a run is and where its time goes, over windows of steps."""

import os
import resource
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ibeton.stages import PARTS, StageWork, stage

WAITING = ("wait", "copy", "mask")  # what the training thread spends on its next batch


@dataclass
class Window:
    """Sums over steps of one process: `images`, `parts` in seconds of the critical path, and the
    loader's `stage_work`."""

    steps: int = 0
    images: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    stage_work: dict[str, StageWork] = field(default_factory=dict)

    def add(self, images: int, parts: dict[str, float], stage_work: dict[str, StageWork]) -> None:
        """Add a step."""
        self.steps += 1
        self.images += images
        for name, seconds in parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + seconds
        for name, work_done in stage_work.items():
            before = self.stage_work.get(name)
            self.stage_work[name] = work_done if before is None else before.plus(work_done)

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def waiting(self) -> float:
        """Seconds that training waited for its batches."""
        return sum(self.parts.get(name, 0.0) for name in WAITING)

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds


def loader_ceiling(stage_work: dict[str, StageWork]) -> float:
    """Images/s that the loader could give if its workers were never idle. Workers share all of
    their stages; each stream works on its own."""
    together = sum(work_done.per_photo for work_done in stage_work.values() if work_done.shared)
    ceilings = [work_done.ceiling for work_done in stage_work.values() if not work_done.shared]
    workers = [work_done.workers for work_done in stage_work.values() if work_done.shared]
    return min([*ceilings, max(workers) / together if together else float("inf")])


class Speed:
    """Figures of one rank since its last record.

    `flops` are those of a step of this rank (0: not counted), `rate` the device's FLOP/s.
    """

    def __init__(self, images: int, world_size: int, device: torch.device, rate: float) -> None:
        self.flops = 0.0
        self.window = Window()
        self._images, self._world_size = images, world_size
        self._device, self._rate = device, rate
        self._first = True
        # Host to host, as asking a GPU would wait for what it has queued.
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None

    def add(self, parts: dict[str, float], stage_work: dict[str, StageWork]) -> None:
        """Add a step. The first step of a process, in which things are compiled, is shown and then
        forgotten."""
        if self._first and self.window.steps:
            self.window, self._first = Window(), False
        self.window.add(self._images, parts, stage_work)

    @property
    def warming_up(self) -> bool:
        """Whether the window is that of the first step, in which things are compiled."""
        return self._first

    def figures(self) -> dict[str, Any]:
        """Means since the last record. images_per_s is that of all ranks, peak_share the share of
        the device's matrix rate; stage_ms are milliseconds per step on the critical path, loader_ms
        milliseconds per photo of one worker or stream."""
        window = self.window
        figures: dict[str, Any] = {
            "images_per_s": window.images_per_s * self._world_size,
            "data_wait": window.waiting / window.seconds,
        }
        if self.flops and self._rate:
            figures["peak_share"] = self.flops * window.steps / window.seconds / self._rate
        figures["memory_gib"] = peak_memory(self._device) / 2**30
        per_step = 1000 / window.steps
        figures["stage_ms"] = {
            name: round(window.parts[name] * per_step, 3) for name in PARTS if name in window.parts
        }
        if window.stage_work:
            figures["loader_ms"] = {
                name: round(1000 * work_done.per_photo, 3)
                for name, work_done in window.stage_work.items()
            }
            figures["loader_ceiling"] = loader_ceiling(window.stage_work) * self._world_size
        return figures

    def ranks(self) -> list[dict[str, float]]:
        """Milliseconds per step of every part, by rank; empty for one process. Collective."""
        if self._group is None:
            return []
        own = torch.tensor([self.window.parts.get(name, 0.0) for name in PARTS])
        own *= 1000 / self.window.steps
        every = [torch.empty_like(own) for _ in range(self._world_size)]
        with stage("comm"):
            dist.all_gather(every, own, group=self._group)
        return [
            {name: round(ms, 3) for name, ms in zip(PARTS, rank.tolist(), strict=True) if ms}
            for rank in every
        ]

    def restart(self) -> None:
        """Begin a new window, after a record."""
        if not self._first:
            self.window = Window()


def slowest(ranks: list[dict[str, float]]) -> tuple[int, float, str, float]:
    """The rank with the most work of its own, that is, without comm, in which it waits for others;
    its milliseconds per step, the stage in which it is furthest behind the mean of the others, and
    by how many milliseconds."""
    own = [sum(parts.values()) - parts.get("comm", 0.0) for parts in ranks]
    rank = max(range(len(ranks)), key=lambda r: own[r])
    others = [parts for r, parts in enumerate(ranks) if r != rank]

    def behind(name: str) -> float:
        mean = sum(parts.get(name, 0.0) for parts in others) / len(others)
        return ranks[rank].get(name, 0.0) - mean

    worst = max((name for name in PARTS if name != "comm"), key=behind)
    return rank, own[rank], worst, behind(worst)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: on the GPU, or else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # bytes there, kilobytes elsewhere


def cores_a_process(cores: int) -> int:
    """Cores of this machine for each of the processes that torchrun started on it."""
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
