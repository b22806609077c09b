"""Timing of the stages of training, with the same names everywhere.

`with stage("teacher"):` times a part of the training thread; these parts add up to the step.
`work.add("decode", seconds, ...)` adds work of the loader's threads, processes and streams, which
runs concurrently; it gives the loader's maximum throughput.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

GRAPHED = ("teacher", "student", "loss", "backward", "optimizer", "ema")
STAGES = (
    *("read", "decode", "copy", "crop", "mask"),
    *GRAPHED,
    *("comm", "graph"),  # graph: those of GRAPHED, replayed as a CUDA graph, as one
)
WAIT, OTHER = "wait", "other"  # waiting for a batch; outside all stages
PARTS = (WAIT, *STAGES, OTHER)


class StageClock:
    """Splits the time of one stream of work into stages.

    Each start and end of a stage is a mark: a CUDA event on the current stream, or the monotonic
    clock on a CPU. The time between two marks belongs to the innermost stage, so nested stages are
    not counted twice and the parts of a lap add up to it. On a GPU the marks measure device time:
    a host that waits while the device is busy costs nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.named = False  # whether stages are labeled in a profiler trace
        self._on_gpu = device.type == "cuda"
        self._spare: list[torch.cuda.Event] = []
        self._open: list[str] = []
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Start a lap here and drop the marks since the last one."""
        self._marks.clear()
        self.mark(self._innermost())

    def enter(self, name: str) -> None:
        self._open.append(name)
        self.mark(name)

    def leave(self) -> None:
        self._open.pop()
        self.mark(self._innermost())

    def lap(self) -> "StepTiming":
        """End the lap and start the next. Its times can be read once the device is done."""
        self.mark(self._innermost())
        lap = StepTiming(self._marks, self._spare if self._on_gpu else None)
        self._marks = self._marks[-1:]
        return lap

    def _innermost(self) -> str:
        return self._open[-1] if self._open else OTHER

    def mark(self, name: str) -> None:
        """Count what follows, up to the next mark, as stage `name`."""
        if not self._on_gpu:
            self._marks.append((name, time.perf_counter()))
            return
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((name, event))


class StepTiming:
    """The marks of a lap: which stage starts at each, and when."""

    def __init__(self, marks: list[tuple[str, Any]], spare: list[torch.cuda.Event] | None) -> None:
        self._marks, self._spare = marks, spare

    def done(self) -> bool:
        """Whether the device has finished the lap."""
        return self._spare is None or self._marks[-1][1].query()

    def seconds(self) -> dict[str, float]:
        """Seconds of each part; they add up to the lap. Waits for the device. Call it once, as the
        events are reused."""
        if self._spare is not None:
            self._marks[-1][1].synchronize()
        parts: dict[str, float] = defaultdict(float)
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            gone = end - begin if self._spare is None else begin.elapsed_time(end) / 1000
            parts[name] += gone
        if self._spare is not None:  # the last one begins the next lap
            self._spare.extend(event for _, event in self._marks[:-1])
        return dict(parts)


_clock: StageClock | None = None


def use(clock: StageClock | None) -> None:
    """Let `stage` report to `clock` from now on; None switches timing off."""
    global _clock
    _clock = clock


@contextmanager
def untimed() -> Iterator[None]:
    """Switch timing off in the block: a CUDA graph that is being captured cannot record marks."""
    before = _clock
    use(None)
    try:
        yield
    finally:
        use(before)


class stage:
    """`with stage("teacher"):` times a part of the training thread, if there is a clock, and labels
    it in a running profiler. Raises ValueError for a name that is not in PARTS."""

    __slots__ = ("_clock", "_label", "_name")

    def __init__(self, name: str) -> None:
        if name not in PARTS:
            raise ValueError(f"stage {name!r}: expected one of {', '.join(PARTS)}")
        self._name = name

    def __enter__(self) -> None:
        self._clock, self._label = _clock, None
        if self._clock is not None:
            self._clock.enter(self._name)
            if self._clock.named:
                self._label = torch.profiler.record_function(self._name)
                self._label.__enter__()

    def __exit__(self, *raised: object) -> None:
        if self._label is not None:
            self._label.__exit__(*raised)
        if self._clock is not None:
            self._clock.leave()


def rest_is(name: str) -> None:
    """Count the rest of the current stage as stage `name`. May be called from any thread that the
    training thread waits for."""
    if _clock is not None:
        _clock.mark(name)


@dataclass(frozen=True)
class StageWork:
    """Work of one stage of the loader: `seconds` summed over `workers` threads, processes or
    streams, for `photos` photos."""

    seconds: float
    photos: int
    workers: int
    shared: bool = True  # whether the workers also do other stages

    def plus(self, more: "StageWork") -> "StageWork":
        """The sum of both."""
        seconds, photos = self.seconds + more.seconds, self.photos + more.photos
        return StageWork(seconds, photos, more.workers, more.shared)

    @property
    def per_photo(self) -> float:
        """Seconds of one worker per photo."""
        return self.seconds / self.photos

    @property
    def ceiling(self) -> float:
        """Images/s if the workers did nothing else."""
        return self.workers / self.per_photo if self.seconds else float("inf")


class Work:
    """The loader's work by stage. Any thread may add; one thread takes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, StageWork] = {}

    def add(
        self, name: str, seconds: float, photos: int, workers: int, shared: bool = True
    ) -> None:
        work_done = StageWork(seconds, photos, workers, shared)
        with self._lock:
            before = self._sums.get(name)
            self._sums[name] = work_done if before is None else before.plus(work_done)

    def take(self) -> dict[str, StageWork]:
        """What was added since the last call."""
        with self._lock:
            sums, self._sums = self._sums, {}
        return sums


work = Work()
