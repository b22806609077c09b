"""Watches a run while it steps: times, figures, advice, a forecast and, on request, a trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ibeton import stages
from ibeton.atomic import replacing
from ibeton.stages import PARTS, StageClock, StageWork, stage
from ibeton.training.timing.bottleneck import LoaderResources, rank_line, verdict
from ibeton.training.timing.flops import flop_counter, matrix_rate
from ibeton.training.timing.forecast import forecast_line
from ibeton.training.timing.speed import MUCH_WAIT, Window, loader_ceiling, peak_memory

_WARM_UP = 2  # first steps, in which things are compiled and allocated
_STEPS, _SECONDS = 10, 20.0  # steps that advice is made of, or fewer if they take that long

Item = TypeVar("Item")


class StepMonitor:
    """The monitor of one rank, whose steps take `images` images each. `steps_left`: steps that the
    run will take, for the forecast; 0: none is made. Measures the device's matrix rate, which takes
    under a second."""

    def __init__(
        self,
        images: int,
        rank: int,
        world_size: int,
        device: torch.device,
        dtype: torch.dtype | None,
        room: LoaderResources,
        steps_left: int = 0,
    ) -> None:
        self.clock = StageClock(device)
        stages.use(self.clock)
        self._images, self._rank, self._world_size, self._device = images, rank, world_size, device
        self._matrix_rate = matrix_rate(device, dtype) if rank == 0 else 0.0
        self._flops = 0.0  # of a step of this rank; 0: not counted yet
        self._window, self._first = Window(), True  # since the last record
        self._adviser = Adviser(room, steps_left, world_size, device)
        self._said = ""
        self._profiler: torch.profiler.profile | None = None
        # Host to host, as asking a GPU would wait for what it has queued.
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None

    def waiting(self, batches: Iterator[Item]) -> Iterator[Item]:
        """The batches; the time that training waits for each is stage "wait"."""
        while True:
            with stage(stages.WAIT):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around a step: counts the operations of the first one."""
        if self._flops or self._rank:
            yield
            return
        with flop_counter() as counter:
            yield
        self._flops = float(counter.get_total_flops())

    def add(self, parts: dict[str, float], stage_work: dict[str, StageWork]) -> list[str]:
        """Add a step, its parts in seconds and the loader's work for it; returns lines to show. The
        first step of a process, in which things are compiled, is shown and then forgotten."""
        if self._first and self._window.steps:
            self._window, self._first = Window(), False
        self._window.add(self._images, parts, stage_work)
        return self._adviser.add(self._images, parts, stage_work)

    def figures(self) -> dict[str, Any]:
        """Means since the last record. images_per_s is that of all ranks, peak_share the share of
        the device's matrix rate; stage_ms are milliseconds per step on the critical path, loader_ms
        milliseconds per photo of one worker or stream."""
        window = self._window
        figures: dict[str, Any] = {
            "images_per_s": window.images_per_s * self._world_size,
            "data_wait": window.waiting / window.seconds,
        }
        if self._flops and self._matrix_rate:
            per_s = self._flops * window.steps / window.seconds
            figures["peak_share"] = per_s / self._matrix_rate
        figures["memory_gib"] = peak_memory(self._device) / 2**30
        figures["stage_ms"] = window.stage_ms()
        if window.stage_work:
            figures["loader_ms"] = {
                name: round(1000 * work_done.per_photo, 3)
                for name, work_done in window.stage_work.items()
            }
            figures["loader_ceiling"] = loader_ceiling(window.stage_work) * self._world_size
        return figures

    def compare_ranks(self) -> tuple[dict[str, Any], list[str]]:
        """For a record: milliseconds of each rank, and a line if one is slower than the others.
        Collective: all ranks must call it. Begins a new window."""
        ranks = self._ranks()
        # In its first steps a rank compiles and allocates, each at its own pace.
        line, said = "" if self._first or not ranks else rank_line(ranks), self._said
        if not self._first:
            self._window = Window()
        self._said = line.split(":")[0]  # whose, not how much
        lines = [line] if self._said not in ("", said) else []
        return {"ranks": ranks} if ranks else {}, lines

    def _ranks(self) -> list[dict[str, float]]:
        """Milliseconds per step of every part, by rank; empty for one process."""
        if self._group is None:
            return []
        own = torch.tensor([self._window.stage_ms().get(name, 0.0) for name in PARTS])
        every = [torch.empty_like(own) for _ in range(self._world_size)]
        with stage("comm"):
            dist.all_gather(every, own, group=self._group)
        return [
            {name: round(ms, 3) for name, ms in zip(PARTS, rank.tolist(), strict=True) if ms}
            for rank in every
        ]

    def trace(self, folder: Path, steps: int) -> None:
        """Trace `steps` early steps with the profiler, to trace.json.gz in `folder`."""

        def write(profiler: torch.profiler.profile) -> None:
            with replacing(folder / "trace.json.gz", suffix=".json.gz") as partial:
                profiler.export_chrome_trace(str(partial))

        plan = torch.profiler.schedule(wait=_WARM_UP, warmup=1, active=steps, repeat=1)
        self._profiler = torch.profiler.profile(
            schedule=plan, on_trace_ready=write, acc_events=True
        )
        self.clock.named = True
        self._profiler.start()

    def stepped(self) -> None:
        """Tell the profiler that a step is over."""
        if self._profiler is not None:
            self._profiler.step()

    def close(self) -> None:
        """End the trace and the clock."""
        if self._profiler is not None:
            self._profiler.stop()
        stages.use(None)


class Adviser:
    """Forecasts the run from its first steps, and says what limits the data side, once per cause.
    It looks at windows of `steps` steps."""

    def __init__(
        self,
        room: LoaderResources,
        steps_left: int,
        world_size: int,
        device: torch.device,
        steps: int = _STEPS,
    ) -> None:
        self._room, self._left, self._steps = room, steps_left, steps
        self._world_size, self._device = world_size, device
        self._window, self._seen = Window(), 0
        self._said: set[str] = set()

    def add(
        self, images: int, parts: dict[str, float], stage_work: dict[str, StageWork]
    ) -> list[str]:
        """Add a step of this process; lines, now and then."""
        self._seen += 1
        if self._seen <= _WARM_UP:
            return []
        self._window.add(images, parts, stage_work)
        if self._window.steps < self._steps and self._window.seconds < _SECONDS:
            return []
        window, self._window = self._window, Window()
        lines = []
        if "forecast" not in self._said and self._left > self._seen:
            self._said.add("forecast")
            seconds = window.seconds / window.steps * (self._left - self._seen)
            rate, share = window.images_per_s * self._world_size, window.waiting / window.seconds
            lines.append(forecast_line(seconds, rate, share, self._device))
        if window.waiting > MUCH_WAIT * window.seconds:
            found = verdict(window, self._room)
            if found.limit not in self._said:
                self._said.add(found.limit)
                lines.append(found.text)
        return lines
