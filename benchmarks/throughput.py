"""How fast is it, where does the time go, what limits, what to change.

    python benchmarks/throughput.py                                    # works anywhere, in minutes
    python benchmarks/throughput.py --arch vit_s --data imagenet.beton   # or any option of train.py
    python benchmarks/throughput.py --arch vit_s --data imagenet.beton --baseline
    python benchmarks/throughput.py --compare before.json after.json

Measures the loader alone, the model alone and both together, with the functions and the clock of
train.py, in rounds that take turns; then the machine's own limits. Leaves throughput.json, .png and
.html, which opens offline. Without --data it draws photos, and takes a ViT that suits the machine.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # not this folder, where files bear the names of packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console

import stages
from benchmarks.drawn import drawn_beton
from benchmarks.measure import machine
from benchmarks.throughput_floors import Demand, Peaks, demand_of, floors, measure_peaks
from benchmarks.throughput_report import compare, print_report, write_html, write_png
from options import Parser
from pipeline import Batch, Loader, build_loader
from pipeline.command import run_command
from pipeline.workers import cores
from stages import PARTS, Lap, StageClock, stage
from train import DTYPES, Run, prepare, rates, train_step
from training.bottleneck import Room, verdict
from training.config import ARCHITECTURES, parse
from training.metrics import LateMetrics
from training.speed import Window

# What is measured where nothing is asked for: on a CPU a small ViT, to be done in minutes.
DEFAULTS = {
    "cpu": ["--arch", "vit_t", "--batch-size", "2"],
    "cuda": ["--arch", "vit_s", "--batch-size", "64"],
}
PHOTOS = {"cpu": 10, "cuda": 320}  # drawn of each of ten classes
LOADER_STEPS = 16  # of a turn of the loader at least: single batches come in bursts
UNTIMED = 2  # steps at the beginning of a turn, until the loader is in its stride
LOADER, MODEL, OFF, BOTH = "loader", "model", "model, clock off", "both"
PIL, PLAIN = "published loader", "plain model"


class Bench:
    """A configuration of train.py. Each side takes a turn of `steps` steps in every round and
    leaves a window of it in `windows`."""

    def __init__(self, run: Run, steps: int) -> None:
        self.run, self.steps = run, steps
        self.images = run.config.pipeline.batch_size
        self.rates = rates(run)[0]
        self.windows: dict[str, list[Window]] = {}
        self._clock = StageClock(run.device)
        self._late = LateMetrics(run.world_size)
        config = run.config.pipeline
        # Batches that a loader may have made ahead, one a worker in the published one. They are
        # taken at the end of a turn, untimed: nothing is left to be made in the turns of others.
        self._ahead = config.batches_ahead * (config.workers or cores()) + 2
        with closing(self._batches(run.loader)) as batches:
            self.batch = next(batches)
            self.batch.global_crops = self.batch.global_crops.clone()

    def loader(self, name: str, loader: Loader) -> None:
        """Batches, of which nothing is made."""
        with closing(self._batches(loader)) as batches:
            for _ in range(UNTIMED):
                next(batches)
            window = Window()
            self._start(self._clock)
            for _ in range(max(self.steps, LOADER_STEPS)):
                with stage(stages.WAIT):
                    next(batches)
                window.add(self.images, self._clock.lap().seconds(), stages.work.take())
            self._end(name, window, batches)

    def model(self) -> None:
        """Steps on one batch, in turn with stages told apart and without."""
        laps: dict[str, list[Lap]] = {MODEL: [], OFF: []}
        self.train_step()
        self._start(self._clock)
        for _ in range(self.steps):
            for name, clock in ((MODEL, self._clock), (OFF, None)):
                stages.use(clock)
                self.train_step()
                laps[name].append(self._clock.lap())
        for name, those in laps.items():
            self._end(name, self._window(those))

    def plain(self, step: Callable[[Any], Any]) -> None:
        """Steps of the plain model on the same batch."""
        step(self.batch)
        self._start(None)
        laps = []
        for _ in range(self.steps):
            step(self.batch)
            laps.append(self._clock.lap())
        self._end(PLAIN, self._window(laps))

    def both(self) -> None:
        """What train.py does, but for its log."""
        window = Window()
        with closing(self._batches(self.run.loader)) as batches:
            self._start(self._clock)
            for i in range(UNTIMED + self.steps):
                with stage(stages.WAIT):
                    batch = next(batches)
                metrics = train_step(self.run, batch, 0, self.rates)
                self._settle(window)
                self._late.push({"step": i}, metrics, self._clock)
            self._settle(window)
            self._end(BOTH, window, batches)

    def train_step(self) -> None:
        train_step(self.run, self.batch, 0, self.rates)

    def sides(self, stack: ExitStack, baseline: bool) -> list[Callable[[], None]]:
        """All turns of a round."""
        sides: list[Callable[[], None]] = [
            functools.partial(self.loader, LOADER, self.run.loader),
            self.model,
            self.both,
        ]
        if baseline:
            from benchmarks.model import Baseline

            config = self.run.config
            pil = build_loader(dataclasses.replace(config.pipeline, loader="pil"), self.run.device)
            stack.callback(pil.close)
            dtype = DTYPES[self.run.precision]
            plain = Baseline(config.model, self.run.device.type, dtype).step
            sides.append(functools.partial(self.loader, PIL, pil))
            sides.append(functools.partial(self.plain, plain))
        return sides

    def _batches(self, loader: Loader) -> Generator[Batch, None, None]:
        """The last batches of an epoch, as many as a turn takes."""
        wanted = UNTIMED + max(self.steps, LOADER_STEPS) + self._ahead
        if loader.steps_per_epoch < wanted:
            raise ValueError(
                f"--data has {len(loader.photos)} photos, {loader.steps_per_epoch} steps; a turn"
                f" takes {wanted}: give more photos, a smaller --batch-size or fewer --steps"
            )
        yield from loader.epoch(0, loader.steps_per_epoch - wanted)

    def _start(self, clock: StageClock | None) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)
        stages.use(clock)
        stages.work.take()
        self._clock.start()

    def _window(self, laps: list[Lap]) -> Window:
        window = Window()
        for lap in laps:
            window.add(self.images, lap.seconds(), {})
        return window

    def _settle(self, window: Window) -> None:
        record = self._late.settle()
        if record is not None and record["step"] >= UNTIMED:
            window.add(self.images, record["parts"], record["efforts"])

    def _end(self, name: str, window: Window, rest: Iterator[Batch] | None = None) -> None:
        stages.use(None)
        self.windows.setdefault(name, []).append(window)
        for _ in rest or ():
            pass


def measure(arguments: list[str], rounds: int, steps: int, baseline: bool) -> dict[str, Any]:
    """Everything, as it goes into the JSON file. `arguments` are options of train.py."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = parse([*arguments, "--output-dir", str(folder / "run")])
        if baseline and config.model.arch not in ARCHITECTURES:
            raise ValueError(f"--baseline: the plain model has no {config.model.arch}")
        run = prepare(config)
        stack.callback(run.loader.close)
        bench = Bench(run, steps)
        demand = demand_of(run, bench.batch, bench.rates)
        sides = bench.sides(stack, baseline)
        peaks = []
        for _ in range(rounds):
            for side in sides:
                side()
            peaks.append(measure_peaks(run))
        return summary(bench, demand, peaks)


def summary(bench: Bench, demand: Demand, peaks: list[Peaks]) -> dict[str, Any]:
    """Figures of all rounds, what follows from them, and what they were measured on."""
    run, windows = bench.run, bench.windows
    config = run.config.pipeline
    room = Room(run.loader.kind, config.workers or cores(), cores(), run.device.type == "cuda")
    best = Peaks(*map(max, zip(*map(dataclasses.astuple, peaks), strict=True)))
    lowest = floors(demand, best, room.workers)
    about = machine("torch", "numba", "ffcv", "nvidia-dali-cuda120", "triton")
    if run.device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(run.device)
    return {
        "machine": about | {"threads": torch.get_num_threads()},
        "run": {
            "arch": run.config.model.arch,
            "device": run.device.type,
            "precision": run.precision,
            "loader": run.loader.kind,
            "batch_size": bench.images,
            "workers": room.workers,
            "photos": len(run.loader.photos),
            "steps": bench.steps,
            "rounds": len(peaks),
        },
        "settings": run.config.resolved(),
        "images_per_s": {
            name: [window.images_per_s for window in side] for name, side in windows.items()
        },
        "step_ms": {
            name: [1000 * w.parts.get(name, 0.0) / w.steps for w in windows[BOTH]]
            for name in PARTS
            if any(name in w.parts for w in windows[BOTH])
        },
        "loader_ms": {
            name: {
                "ms": [1000 * bench.images / w.efforts[name].ceiling for w in windows[LOADER]],
                "lanes": effort.lanes,
            }
            for name, effort in windows[LOADER][0].efforts.items()
        },
        "floor_ms": {name: 1000 * seconds for name, seconds in lowest.items()},
        "peaks": dataclasses.asdict(best),
        "clock": clock_cost(bench),
        "verdict": sentences(windows, room, lowest),
    }


def clock_cost(bench: Bench) -> dict[str, Any]:
    """What the clock takes of a step: marks counted, times the cost of one in a loop by itself."""
    many, on_cpu = 1000, StageClock(torch.device("cpu"))
    clock = bench._clock if bench.run.device.type == "cuda" else on_cpu
    stages.use(clock)
    clock.start()
    laps = []
    for _ in range(20):  # of which the best is no one else's turn
        for _ in range(many):
            with stage("loss"):
                pass
        laps.append(clock.lap())
    seconds = min(sum(lap.seconds().values()) for lap in laps) / many
    stages.use(None)
    window = bench.windows[BOTH][0]
    share = seconds * len(window.parts) * window.steps / window.seconds
    return {"us_a_stage": 1e6 * seconds, "share_of_step": share}


def sentences(windows: dict[str, list[Window]], room: Room, lowest: dict[str, float]) -> list[str]:
    """What limits, what changing it would bring, and how far from the best the two together are."""
    rate = {name: statistics.median(w.images_per_s for w in side) for name, side in windows.items()}
    middle = sorted(windows[BOTH], key=lambda window: window.images_per_s)[len(windows[BOTH]) // 2]
    least = min((LOADER, MODEL), key=lambda name: rate[name])
    found = verdict(middle, room, lowest).text
    said = [f"{found[0].upper()}{found[1:]}."]
    said.append(
        f"Both together give {rate[BOTH]:.4g} images/s, {rate[BOTH] / rate[least]:.0%} of what the"
        f" {least} alone does, the slower of the two (loader {rate[LOADER]:.4g}, model"
        f" {rate[MODEL]:.4g})."
    )
    if not room.on_gpu:
        shared = 1 / (1 / rate[LOADER] + 1 / rate[MODEL])
        said.append(
            "Loader and model share the cores of this machine; one after the other they would give"
            f" {shared:.4g}."
        )
    return said


def arguments(given: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options of this file, and those of train.py."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are those of train.py, see `python train.py --help`.",
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=0, help="steps of a turn (0: 1, on GPUs 20)")
    parser.add_argument("--baseline", action="store_true", help="published loader, plain model too")
    parser.add_argument("--report", type=Path, default=Path("runs/throughput"), help="folder")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="JSON", help="measure nothing")
    own, rest = parser.parse_known_args(given)
    if own.rounds < 1 or own.steps < 0:
        parser.error("--rounds must be at least 1 and --steps not negative")
    return own, rest


def main(given: list[str] | None = None) -> int:
    """0, 2 for bad input, 1 for a failure on the way."""
    own, rest = arguments(given)
    console = Console(width=110, highlight=False)

    def act() -> int:
        if own.compare:
            compare(own.compare[0], own.compare[1], console)
            return 0
        device = "cuda" if torch.cuda.is_available() else "cpu"
        options = rest
        with tempfile.TemporaryDirectory() as folder:
            if "--data" not in rest:
                data = drawn_beton(Path(folder), PHOTOS[device])
                options = [*DEFAULTS[device], *rest, "--data", data]
            steps = own.steps or {"cpu": 1, "cuda": 20}[device]
            result = measure(options, own.rounds, steps, own.baseline)
        own.report.mkdir(parents=True, exist_ok=True)
        (own.report / "throughput.json").write_text(json.dumps(result, indent=1))
        picture = write_png(result, own.report / "throughput.png")
        page = write_html(result, picture, own.report / "throughput.html")
        print_report(result, console)
        console.print(f"{page}, {picture} and throughput.json beside them", soft_wrap=True)
        return 0

    return run_command(act, writes=False)


if __name__ == "__main__":
    sys.exit(main())
