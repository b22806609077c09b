"""Measure how fast training is, where the time goes, what limits it, what to change.

    ibeton throughput                                      # anywhere, in minutes
    ibeton throughput --arch vit_s --data imagenet.beton   # any option of train.py
    ibeton throughput --arch vit_s --data imagenet.beton --baseline
    ibeton throughput --compare before.json after.json
    torchrun --nproc_per_node 8 benchmarks/throughput.py --data imagenet.beton

The loader alone, the model alone and both together run in alternating rounds,
with the functions and the clock of train.py; then the machine's own limits are
measured. Writes throughput.json, .png and .html, which opens offline. Without
--data it generates photos and takes a ViT that suits the machine. With several
processes, the figures are rank 0's, with one line per rank below.
"""

from ibeton.workers import before_torch, cores

if __name__ == "__main__":
    before_torch()  # as train.py does

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ibeton import stages
from ibeton.benchmarks.harness.measure import machine
from ibeton.benchmarks.harness.throughput_bench import BOTH, LOADER, MODEL, Bench, loader_turn
from ibeton.benchmarks.harness.throughput_floors import (
    Demand,
    Peaks,
    demand_of,
    floors,
    measure_peaks,
)
from ibeton.benchmarks.harness.throughput_report import compare, print_report, write_html, write_png
from ibeton.benchmarks.synthetic.dataset import synthetic_beton
from ibeton.benchmarks.synthetic.photos import CLASSES
from ibeton.command import run_command
from ibeton.distributed import adopt_slurm, leave_group
from ibeton.options import Parser, add_options, fill
from ibeton.pipeline import PipelineConfig
from ibeton.pipeline.loaders import LOADERS, RECIPE
from ibeton.pipeline.loaders.kinds import choose_loader
from ibeton.progress import plain_console
from ibeton.stages import PARTS, stage
from ibeton.train import Run, prepare
from ibeton.training.config import ARCHITECTURES, parse
from ibeton.training.problems import check_output_dir
from ibeton.training.timing.bottleneck import LoaderResources, rank_line, verdict
from ibeton.training.timing.speed import Window, cores_a_process

# Defaults without options: a small ViT on a CPU, so that it takes minutes.
DEFAULTS = {
    "cpu": ["--arch", "vit_t", "--batch-size", "2"],
    "cuda": ["--arch", "vit_s", "--batch-size", "64"],
}


def draw_photos(folder: Path, options: list[str], steps: int, baseline: bool) -> str:
    """A .beton in `folder` of as many drawn photos as the turns of all processes take. `options`:
    of train.py."""
    parser = Parser()
    add_options(parser, PipelineConfig)
    given = vars(parser.parse_known_args([*options, "--data", "drawn.beton"])[0])
    config = fill(PipelineConfig, given)
    config.check()
    adopt_slurm(os.environ)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds = [choose_loader(config, device)[0], *([LOADERS[RECIPE]] if baseline else [])]
    most = max(sum(loader_turn(config, kind, steps)) for kind in kinds)
    photos = most * config.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    return synthetic_beton(folder, -(-photos // len(CLASSES)))


def measure(arguments: list[str], rounds: int, steps: int, baseline: bool) -> dict[str, Any] | None:
    """Everything, as it goes into the JSON file; None on other ranks than 0. `arguments` are
    options of train.py."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = parse([*arguments, "--output-dir", str(folder / "run")])
        if baseline and config.model.arch not in ARCHITECTURES:
            raise ValueError(f"--baseline: the plain model has no {config.model.arch}")
        run = prepare(config)
        stack.callback(leave, run)
        stack.enter_context(run.watchdog.report_errors())
        bench = Bench(run, steps)
        demand = demand_of(run, bench.batch, bench.rates)
        sides = bench.sides(stack, baseline)
        peaks = []
        bench.warm_up()
        for _ in range(rounds):
            for side in sides:
                side()
            peaks.append(measure_peaks(run))
        found = summary(bench, demand, peaks)
        return None if run.rank else found


def leave(run: Run) -> None:
    """End threads, worker processes and the group."""
    run.loader.close()
    run.watchdog.close()
    leave_group()


def of_ranks(bench: Bench) -> list[dict[str, float]]:
    """Milliseconds per step of every part, loader and model together, by rank; empty for one
    process. All ranks must ask."""
    if bench.run.world_size == 1:
        return []
    windows = bench.windows[BOTH]
    steps = sum(window.steps for window in windows)
    sums = {name: sum(w.parts.get(name, 0.0) for w in windows) for name in PARTS}
    own = {name: 1000 * seconds / steps for name, seconds in sums.items() if seconds}
    ranks: list[dict[str, float]] = [{}] * bench.run.world_size
    dist.all_gather_object(ranks, own)
    return ranks


def summary(bench: Bench, demand: Demand, peaks: list[Peaks]) -> dict[str, Any]:
    """Figures of all rounds, what follows from them, and what they were measured on. All ranks must
    ask."""
    run, windows = bench.run, bench.windows
    config = run.config.pipeline
    workers, at_hand = config.workers or cores(), cores_a_process(cores())
    on_gpu, per_epoch = run.device.type == "cuda", run.loader.steps_per_epoch
    room = LoaderResources(run.loader.kind, workers, at_hand, on_gpu, per_epoch)
    ranks = of_ranks(bench)
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
            "loader": run.loader.kind.name,
            "batch_size": bench.images,
            "processes": run.world_size,
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
        "loader_ms": loader_ms(windows[LOADER], bench.images),
        "middle_round": middle_round(windows[BOTH]),
        "ranks": ranks,
        "floor_ms": {name: 1000 * seconds for name, seconds in lowest.items()},
        "peaks": dataclasses.asdict(best),
        "clock": clock_cost(bench),
        "verdict": sentences(windows, room, lowest, ranks),
    }


def loader_ms(windows: list[Window], images: int) -> dict[str, dict[str, Any]]:
    """Milliseconds per batch of each of the loader's stages, by round, where all of its workers
    work at once. Some rounds may have no work of a stage."""
    workers = {name: done.workers for window in windows for name, done in window.stage_work.items()}

    def milliseconds(name: str) -> list[float]:
        works = (window.stage_work.get(name) for window in windows)
        return [1000 * images / done.ceiling if done else 0.0 for done in works]

    return {name: {"ms": milliseconds(name), "workers": workers[name]} for name in workers}


def clock_cost(bench: Bench) -> dict[str, float]:
    """What the clock takes of a step: its marks, times the cost of one in a loop by itself."""
    many, window = 1000, bench.windows[BOTH][0]
    stages.use(bench.clock)
    bench.clock.start()
    laps = []
    for _ in range(20):  # of which the best is no one else's turn
        for _ in range(many):
            with stage("loss"):
                pass
        laps.append(sum(bench.clock.lap().seconds().values()))
    stages.use(None)
    per_stage = min(laps) / many
    share = per_stage * len(window.parts) * window.steps / window.seconds
    return {"us_per_stage": 1e6 * per_stage, "share_of_step": share}


def middle_round(windows: list[Window]) -> int:
    """The round with the median rate. Its stages add up to its step, so table and verdict speak of
    it and agree."""
    order = sorted(range(len(windows)), key=lambda i: windows[i].images_per_s)
    return order[len(order) // 2]


def sentences(
    windows: dict[str, list[Window]],
    room: LoaderResources,
    lowest: dict[str, float],
    ranks: list[dict[str, float]],
) -> list[str]:
    """What limits, how far from the best loader and model together are, and the slowest rank."""
    rate = {name: statistics.median(w.images_per_s for w in side) for name, side in windows.items()}
    middle = windows[BOTH][middle_round(windows[BOTH])]
    rate[BOTH] = middle.images_per_s
    least = min((LOADER, MODEL), key=lambda name: rate[name])
    said = [
        sentence(verdict(middle, room, lowest).text),
        f"Both together give {rate[BOTH]:.4g} images/s, {rate[BOTH] / rate[least]:.0%} of what the"
        f" {least} alone does, the slower of the two (loader {rate[LOADER]:.4g}, model"
        f" {rate[MODEL]:.4g}).",
    ]
    if not room.on_gpu:
        shared = 1 / (1 / rate[LOADER] + 1 / rate[MODEL])
        said.append(
            "Loader and model share the cores of this machine; run one after the other they would"
            f" give {shared:.4g}."
        )
    if ranks:
        together = f"{len(ranks)} processes give {len(ranks) * rate[BOTH]:.4g} images/s"
        said += [f"That is rank 0; {together}.", sentence(rank_line(ranks) or "no rank is slower")]
    return said


def sentence(words: str) -> str:
    """With a capital and a full stop, where there is none yet."""
    return words[0].upper() + words[1:] + ("" if words.endswith("?") else ".")


def arguments(given: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options of this file, and those of train.py."""
    parser = Parser(
        description=__doc__,
        epilog="All other options are those of train.py, see `ibeton train --help`.",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns per side")
    parser.add_argument("--steps", type=int, default=0, help="steps per turn (0: 1, on GPUs 20)")
    parser.add_argument(
        "--baseline", action="store_true", help="also the published loader and the plain model"
    )
    parser.add_argument("--report", type=Path, default=Path("runs/throughput"), help="folder")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="JSON", help="compare two reports")
    own, rest = parser.parse_known_args(given)
    if own.rounds < 1 or own.steps < 0:
        parser.error("--rounds must be at least 1 and --steps not negative")
    return own, rest


def main(given: list[str] | None = None) -> int:
    """0, 2 for bad input, 1 for a failure on the way."""
    own, rest = arguments(given)
    console = plain_console()

    def act() -> int:
        if own.compare:
            compare(own.compare[0], own.compare[1], console)
            return 0
        check_output_dir(own.report, "--report")  # not after minutes of measuring
        device = "cuda" if torch.cuda.is_available() else "cpu"
        options, steps = rest, own.steps or {"cpu": 1, "cuda": 20}[device]
        with tempfile.TemporaryDirectory() as folder:
            if not {"--data", "--config"} & {word.partition("=")[0] for word in rest}:
                options = [*DEFAULTS[device], *rest]
                options += ["--data", draw_photos(Path(folder), options, steps, own.baseline)]
            result = measure(options, own.rounds, steps, own.baseline)
        if result is None:
            return 0
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
