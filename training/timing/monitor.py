"""What watches a run while it steps: clock, figures, advice, and a trace where one is asked for."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from ibeton import stages
from ibeton.stages import StageClock, StageWork, stage
from ibeton.training.timing.bottleneck import Adviser, LoaderResources, rank_line
from ibeton.training.timing.flops import flop_counter, matrix_rate
from ibeton.training.timing.speed import Speed

_BEFORE_TRACE = 2  # steps in which things are still compiled and allocated

Item = TypeVar("Item")


class StepMonitor:
    """Of one rank, whose steps take `images`. Measures the matrix rate, in under a second."""

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

    def waiting(self, batches: Iterator[Item]) -> Iterator[Item]:
        """The batches; the time that the training stands still for each is stage "wait"."""
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
        """Add a settled step, its parts in seconds and the loader's work for it; what there is to
        say about it."""
        self._speed.add(parts, stage_work)
        line = self._adviser.add(self._images, parts, stage_work)
        return [line] if line else []

    def figures(self) -> dict[str, Any]:
        """See `Speed.figures`."""
        return self._speed.figures()

    def compare_ranks(self) -> tuple[dict[str, Any], list[str]]:
        """For a record: what each rank takes, which is the slowest, and a line where one stands
        out. All ranks must ask; then a new window begins."""
        ranks = self._speed.ranks()
        self._speed.restart()
        if not ranks:
            return {}, []
        line, said = rank_line(ranks), self._said
        self._said = line.split(":")[0]  # whose, not how much
        return {"ranks": ranks}, [line] if self._said not in ("", said) else []

    def trace(self, folder: Path, steps: int) -> None:
        """Write what the profiler sees of `steps` early steps to trace.json.gz in `folder`."""

        def write(profiler: torch.profiler.profile) -> None:
            partial = folder / ".trace.partial.json.gz"
            profiler.export_chrome_trace(str(partial))
            partial.replace(folder / "trace.json.gz")

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
