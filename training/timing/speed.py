"""Where the time of steps goes: sums over windows of them, and what the machine has."""

import os
import resource
import sys
from dataclasses import dataclass, field

import torch

from ibeton.stages import PARTS, StageWork

WAITING = ("wait", "copy", "mask")  # what the training thread spends on its next batch
MUCH_WAIT = 0.05  # share of the step above which waiting is no accident


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

    def stage_ms(self) -> dict[str, float]:
        """Milliseconds per step of each part that occurs."""
        per_step = 1000 / self.steps
        return {n: round(self.parts[n] * per_step, 3) for n in PARTS if n in self.parts}


def loader_ceiling(stage_work: dict[str, StageWork]) -> float:
    """Images/s that the loader could give if its workers were never idle. Workers share all of
    their stages; each stream works on its own."""
    together = sum(work_done.per_photo for work_done in stage_work.values() if work_done.shared)
    ceilings = [work_done.ceiling for work_done in stage_work.values() if not work_done.shared]
    workers = [work_done.workers for work_done in stage_work.values() if work_done.shared]
    return min([*ceilings, max(workers) / together if together else float("inf")])


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
