"""What benchmarks/throughput.py measures, in turns: the loader, the model, and both together."""

import dataclasses
import functools
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from typing import Any

import torch

from ibeton import stages
from ibeton.benchmarks.harness.model_step import Baseline
from ibeton.pipeline import Batch, Loader, PipelineConfig, build_loader
from ibeton.pipeline.loaders import RECIPE, LoaderKind
from ibeton.stages import StageClock, stage
from ibeton.train import Run, train_step
from ibeton.training.log.metrics import DelayedMetrics
from ibeton.training.precision import DTYPES
from ibeton.training.run import rate_schedule
from ibeton.training.timing.speed import Window
from ibeton.workers import cores

LOADER_STEPS = 16  # of a turn of the loader at least: single batches come in bursts
UNTIMED = 2  # steps at the beginning of a turn at least, until the loader is in its stride
LOADER, MODEL, BOTH = "loader", "model", "both"
PUBLISHED, PLAIN = "published loader", "plain model"


def loader_turn(config: PipelineConfig, kind: LoaderKind, steps: int) -> tuple[int, int]:
    """Steps of a turn of a loader alone that are left out, and that are timed. Each worker process
    makes a batch by itself, so that as many as there are workers arrive at once: whole bursts are
    left out and timed."""
    burst = (config.workers or cores()) if kind.worker_processes else 1
    timed = max(steps, LOADER_STEPS)
    return max(UNTIMED, burst), -(-timed // burst) * burst


class Bench:
    """A configuration of train.py. Each side takes a turn of `steps` steps in every round and
    leaves a window of it in `windows`."""

    def __init__(self, run: Run, steps: int) -> None:
        self.run, self.steps = run, steps
        self.images = run.config.pipeline.batch_size
        self.rates = rate_schedule(run)[0]
        self.windows: dict[str, list[Window]] = {}
        self.clock = StageClock(run.device)
        self._late = DelayedMetrics(run.world_size)
        with closing(self._batches(run.loader)) as batches:
            self.batch = next(batches)
            self.batch.global_crops = self.batch.global_crops.clone()

    def loader(self, name: str, loader: Loader) -> None:
        """Batches, of which nothing is made."""
        untimed, timed = loader_turn(self.run.config.pipeline, loader.kind, self.steps)
        with closing(self._batches(loader)) as batches:
            for _ in range(untimed):
                next(batches)
            window = Window()
            self._start()
            for _ in range(timed):
                with stage(stages.WAIT):
                    next(batches)
                window.add(self.images, self.clock.lap().seconds(), stages.work.take())
        self._end(name, window)
        if loader is not self.run.loader:
            loader.close()  # its workers would go on in the turns of others

    def model(self, name: str, step: Callable[[Any], Any]) -> None:
        """Steps on one batch, whose times are read at the end."""
        step(self.batch)
        self._start()
        laps = []
        for _ in range(self.steps):
            step(self.batch)
            laps.append(self.clock.lap())
        window = Window()
        for lap in laps:
            window.add(self.images, lap.seconds(), {})
        self._end(name, window)

    def both(self) -> None:
        """What train.py does, but for its log."""
        window = Window()
        with closing(self._batches(self.run.loader)) as batches:
            self._start()
            for i in range(UNTIMED + self.steps):
                with stage(stages.WAIT):
                    batch = next(batches)
                metrics = train_step(self.run, batch, 0, self.rates)
                self._settle(window)
                self._late.enqueue({"step": i}, metrics, self.clock)
            self._settle(window)
        self._end(BOTH, window)

    def warm_up(self) -> None:
        """A turn that does not count, if steps are captured as CUDA graphs: one for each number of
        masked patches."""
        if self.run.graphed_step is not None:
            self.both()
            self.windows.clear()

    def sides(self, stack: ExitStack, baseline: bool) -> list[Callable[[], None]]:
        """All turns of a round."""
        run, take = self.run, functools.partial
        ours = take(train_step, run, epoch=0, rates=self.rates)
        sides: list[Callable[[], None]] = [
            *(take(self.loader, LOADER, run.loader), take(self.model, MODEL, ours), self.both)
        ]
        if baseline:
            recipe = dataclasses.replace(run.config.pipeline, loader=RECIPE)
            published = build_loader(recipe, run.device)
            stack.callback(published.close)
            plain = Baseline(run.config.model, run.device.type, DTYPES[run.precision]).step
            sides += [take(self.loader, PUBLISHED, published), take(self.model, PLAIN, plain)]
        return sides

    def _batches(self, loader: Loader) -> Generator[Batch, None, None]:
        """The last batches of an epoch, as many as a turn takes."""
        wanted = sum(loader_turn(self.run.config.pipeline, loader.kind, self.steps))
        if loader.steps_per_epoch < wanted:
            fewer = ["fewer --steps"] if self.steps > LOADER_STEPS else []
            fewer += ["fewer --workers"] if loader.kind.worker_processes else []
            raise ValueError(
                f"--data has {len(loader.photos)} photos, {loader.steps_per_epoch} steps; a turn"
                f" takes {wanted}: give"
                f" {' or '.join(['more photos', 'a smaller --batch-size', *fewer])}"
            )
        yield from loader.epoch(0, loader.steps_per_epoch - wanted)

    def _start(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)
        stages.use(self.clock)
        stages.work.take()
        self.clock.start()

    def _settle(self, window: Window) -> None:
        record = self._late.resolve()
        if record is not None and record["step"] >= UNTIMED:
            window.add(self.images, record["parts"], record["stage_work"])

    def _end(self, name: str, window: Window) -> None:
        stages.use(None)
        self.windows.setdefault(name, []).append(window)
        self.run.loader.discard_ahead()  # or it would work in the next turn
