"""Watches a run while it steps: clock, figures, advice and, on request, a trace."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from ibeton import stages
from ibeton.atomic import replacing
from ibeton.stages import StageClock, StageWork, stage
from ibeton.training.timing.bottleneck import Adviser, LoaderResources, rank_line
from ibeton.training.timing.flops import flop_counter, matrix_rate
from ibeton.training.timing.speed import Speed


class Forecast(Protocol):
    """Says once, from the first steps, what the run will take."""

    def add(self, images: int, parts: dict[str, float]) -> str: ...


_BEFORE_TRACE = 2  # steps in which things are still compiled and allocated

Item = TypeVar("Item")


class StepMonitor:
    """The monitor of one rank, whose steps take `images` images. Measuring the device's matrix rate
    takes it under a second."""

    def __init__(
        self,
        images: int,
        rank: int,
        world_size: int,
        device: torch.device,
        dtype: torch.dtype | None,
        room: LoaderResources,
    ) -> None:
        self.clock = StageClock(device)
        stages.use(self.clock)
        self._rank, self._images = rank, images
        rate = matrix_rate(device, dtype) if rank == 0 else 0.0
        self._speed = Speed(images, world_size, device, rate)
        self._adviser = Adviser(room)
        self._said = ""
        self._profiler: torch.profiler.profile | None = None
        self.forecast: Forecast | None = None

    def waiting(self, batches: Iterator[Item]) -> Iterator[Item]:
        """The batches; the time that training waits for each is stage "wait"."""
        while True:
            with stage(stages.WAIT):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def counting(self) -> AbstractContextManager[None]:
        """Around a step: counts the operations of the first one."""
        return nullcontext() if self._speed.flops or self._rank else self._count()

    @contextmanager
    def _count(self) -> Iterator[None]:
        with flop_counter() as counter:
            yield
        self._speed.flops = float(counter.get_total_flops())

    def add(self, parts: dict[str, float], stage_work: dict[str, StageWork]) -> list[str]:
        """Add a step, its parts in seconds and the loader's work for it; returns lines to show."""
        self._speed.add(parts, stage_work)
        lines = [self._adviser.add(self._images, parts, stage_work)]
        if self.forecast is not None:
            lines.append(self.forecast.add(self._images, parts))
        return [line for line in lines if line]

    def figures(self) -> dict[str, Any]:
        """See `Speed.figures`."""
        return self._speed.figures()

    def compare_ranks(self) -> tuple[dict[str, Any], list[str]]:
        """For a record: milliseconds of each rank, and a line if one is slower than the others.
        Collective: all ranks must call it. Begins a new window."""
        ranks, first = self._speed.ranks(), self._speed.warming_up
        self._speed.restart()
        if not ranks:
            return {}, []
        # In its first steps a rank compiles and allocates, each at its own pace.
        line, said = "" if first else rank_line(ranks), self._said
        self._said = line.split(":")[0]  # whose, not how much
        return {"ranks": ranks}, [line] if self._said not in ("", said) else []

    def trace(self, folder: Path, steps: int) -> None:
        """Trace `steps` early steps with the profiler, to trace.json.gz in `folder`."""

        def write(profiler: torch.profiler.profile) -> None:
            with replacing(folder / "trace.json.gz", suffix=".json.gz") as partial:
                profiler.export_chrome_trace(str(partial))

        plan = torch.profiler.schedule(wait=_BEFORE_TRACE, warmup=1, active=steps, repeat=1)
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
