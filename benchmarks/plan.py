"""How long will a run take on a machine, will it fit, what will limit: before there is a machine.

    python benchmarks/plan.py --arch vit_s --epochs 800 --gpu v100 --gpus 16 --cores-per-gpu 5
    python benchmarks/plan.py --arch vit_b --gpu a100 --gpus 8 --batch-size 128 --images 14000000
    python benchmarks/plan.py --published --gpu v100 --gpus 16 --cores-per-gpu 5   # not ours
    python benchmarks/plan.py --measure --arch vit_t --data photos.beton           # of this machine

Any option of train.py that changes the work (crops, batch, precision, loader) may be given too. The
step's operations and bytes are counted (training.forecast.estimate), and divided by rates from data
sheets, of which a pessimist and an optimist expect different shares, or by rates measured here.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ibeton.benchmarks.harness.measure import in_words, machine
from ibeton.benchmarks.harness.plan_devices import (
    COSTS,
    DEVICES,
    REASONS,
    device_rates,
    loader_costs,
    loader_reason,
)
from ibeton.command import run_command
from ibeton.model import build
from ibeton.options import Parser
from ibeton.pipeline.loaders import LOADERS, choose_crops, choose_loader
from ibeton.pipeline.store import open_photos
from ibeton.train import DTYPES
from ibeton.training.config import Config, parse
from ibeton.training.forecast.estimate import (
    FULL,
    HALF,
    Rates,
    StepShape,
    step_ops,
    step_shape,
    weights_of,
)
from ibeton.training.forecast.estimate import flops as flops_of
from ibeton.training.forecast.memory import checkpoint_bytes, gpu_bytes, largest_batch
from ibeton.training.forecast.photo_cost import SHARED_CORES, photo_cost
from ibeton.training.forecast.preflight import available_memory, duration, gib
from ibeton.training.forecast.projection import (
    Forecast,
    LoaderCost,
    forecast,
    hours,
    measured_rates,
)
from ibeton.workers import cores

DECODED = 3 * 0.2e6  # bytes of an ImageNet photo as it comes: 0.20 megapixels
EXPECTED = ("pessimist", "between", "optimist")
Pair = tuple[Rates, Rates]
Costs = tuple[LoaderCost, LoaderCost]


@dataclass(frozen=True)
class Setup:
    """What to plan for: rates and costs of the pessimist and the optimist, of one process."""

    name: str
    rates: Pair
    costs: Costs
    room: float  # bytes of the device
    processes: int
    cores: float
    threads: int  # of the model, on a CPU
    images: int
    photo_bytes: float
    reasons: list[str]


def between(low: float, high: float) -> float:
    """The middle of two rates."""
    return math.sqrt(low * high)


def plan(shape: StepShape, setup: Setup, epochs: int, sharded: bool = False) -> dict[str, Any]:
    """All figures, as they go into the JSON file. Rates are of all processes together. `sharded`:
    so are the optimizer's moments."""
    every = three(shape, setup)
    speeds = [each.images_per_s * setup.processes for each in every]
    middle = every[1]
    found = {
        "setup": asdict(setup),
        "step": {
            "images": shape.images,
            "gflop_an_image": flops_of(step_ops(shape)) / shape.images / 1e9,
            "masked_share": shape.masked,
        },
        "images_per_s": dict(zip(EXPECTED, speeds, strict=True)),
        "images_per_s_a_process": {
            name: each.images_per_s for name, each in zip(EXPECTED, every, strict=True)
        },
        "sides": {name: each.sides for name, each in zip(EXPECTED, every, strict=True)},
        "step_ms": {
            name: 1000 * shape.images / each.images_per_s
            for name, each in zip(EXPECTED, every, strict=True)
        },
        "hours": {
            name: hours(setup.images * epochs, speed)
            for name, speed in zip(EXPECTED, speeds, strict=True)
        },
        "limit": {name: each.limit for name, each in zip(EXPECTED, every, strict=True)},
        "page_cache": setup.images * setup.photo_bytes,
        "disk_bytes_per_s": {
            name: speed * setup.photo_bytes for name, speed in zip(EXPECTED, speeds, strict=True)
        },
        "checkpoint": checkpoint_bytes(shape.weights),
        "epochs": epochs,
        "verdict": verdict(middle, setup),
    }
    if not shape.plain and not setup.threads:  # what the plain model keeps is not counted
        found |= memory(shape, setup, sharded)
    return found


def three(shape: StepShape, setup: Setup) -> list[Forecast]:
    """Forecasts of the pessimist, of the middle of all rates, and of the optimist."""
    (low, high), (dear, cheap) = setup.rates, setup.costs
    middle = Rates(*map(between, low, high))
    cost = LoaderCost(between(dear.decode, cheap.decode), between(dear.crop, cheap.crop))
    workers = math.ceil(setup.cores)
    return [
        forecast(shape, rates, costs, workers, setup.cores, setup.threads)
        for rates, costs in ((low, dear), (middle, cost), (high, cheap))
    ]


def memory(shape: StepShape, setup: Setup, sharded: bool) -> dict[str, Any]:
    """GPU memory by what it is for, and the largest batch."""

    def parts(images: int) -> dict[str, float]:
        return gpu_bytes(replace(shape, images=images), setup.processes, DECODED, sharded)

    most = largest_batch(lambda images: sum(parts(images).values()), setup.room)
    return {"memory": parts(shape.images), "room": setup.room, "largest_batch": most}


def verdict(middle: Forecast, setup: Setup) -> str:
    """What limits, and what would change it."""
    sides = {name: rate * setup.processes for name, rate in middle.sides.items()}
    rates = ", ".join(f"{name} {rate:.4g}" for name, rate in sides.items())
    head = f"The {middle.limit} limits (images/s: {rates})."
    if middle.limit == "loader":
        needed = setup.cores * middle.sides["model"] / middle.sides["loader"]
        return f"{head} The model would keep {needed:.1f} cores busy for each process."
    if middle.limit == "cores":
        return f"{head} Loader and model share {setup.cores:g} core(s): more of them, or a GPU."
    spare = middle.sides["loader"] / middle.sides["model"]
    return f"{head} The loader could feed {spare:.1f} times as much: a faster device is of use."


def from_table(own: argparse.Namespace, config: Config, shape: StepShape, precision: str) -> Setup:
    """A setup of data sheets and of the loaders' measured rates."""
    device = DEVICES[own.gpu]
    name = "published" if own.published else config.pipeline.loader
    name = _priced("ffcv" if name == "auto" else name, config, torch.device("cuda"))
    costs = loader_costs(name, shape.pixels() // shape.images)
    title = f"{own.gpus} x {own.gpu} ({device.source}), {own.cores_per_gpu:g} cores each"
    return Setup(
        title, device_rates(device, precision), costs, device.memory * 2**30, own.gpus,
        own.cores_per_gpu, 0, own.images, own.photo_kb * 1000, [*REASONS, loader_reason(name)],
    )  # fmt: skip


def from_here(own: argparse.Namespace, config: Config, shape: StepShape, precision: str) -> Setup:
    """A setup of this machine, measured in a few seconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu, stored, images = device.type == "cuda", own.photo_kb * 1000, own.images
    if config.pipeline.data == UNKNOWN:
        name = "ffcv" if config.pipeline.loader in ("auto", "ffcv") else "pil"
        name = _priced(name, config, device)
        costs = loader_costs(name, shape.pixels() // shape.images)
    else:
        photos, (kind, _) = (
            open_photos(config.pipeline.data),
            choose_loader(config.pipeline, device),
        )
        cut_here = choose_crops(config.pipeline, kind, device) == "cpu"
        cost = photo_cost(photos, config.pipeline, kind, cut_here)
        slower = (SHARED_CORES * cost.loader.decode, SHARED_CORES * cost.loader.crop)
        costs, stored, images = (LoaderCost(*slower), cost.loader), cost.stored, len(photos)
    return Setup(
        "this machine", measured_rates(shape, device, DTYPES[precision]), costs,
        torch.cuda.mem_get_info()[1] if on_gpu else available_memory(), own.gpus,
        own.cores_per_gpu if on_gpu else cores(), 0 if on_gpu else torch.get_num_threads(),
        images, stored,
        [
            "rates are the quartiles of a second's slices on this machine:"
            f" {in_words(machine('torch'))}",
            f"cores that share what they are made of do 1/{SHARED_CORES} each",
        ],
    )  # fmt: skip


def _priced(loader: str, config: Config, device: torch.device) -> str:
    """What the table of costs calls `loader` beside `device`. Raises as `choose_crops`."""
    if loader not in LOADERS:
        return loader
    where = choose_crops(config.pipeline, LOADERS[loader], device)
    on_cpu = f"{loader} on cpu"
    return on_cpu if where == "cpu" and on_cpu in COSTS else loader


def show(result: dict[str, Any], console: Console) -> None:
    """Table, memory, verdict and reasons."""
    setup = result["setup"]
    table = Table(title=setup["name"], title_justify="left")
    table.add_column("")
    for name in EXPECTED:
        table.add_column(name, justify="right")

    def row(name: str, values: dict[str, Any], form: str = "{:,.4g}") -> None:
        table.add_row(name, *(form.format(values[each]) for each in EXPECTED))

    row("images/s", result["images_per_s"])
    row("images/s a process", result["images_per_s_a_process"])
    row("ms a step", result["step_ms"])
    epochs = {name: duration(value) for name, value in result["hours"].items()}
    row(f"{result['epochs']} epochs", epochs, "{}")
    row("limited by the", result["limit"], "{}")
    row(
        "MB/s from disk, if not cached", {k: v / 1e6 for k, v in result["disk_bytes_per_s"].items()}
    )
    console.print(table)
    lines = []
    if "memory" in result:
        parts = ", ".join(f"{name} {gib(size)}" for name, size in result["memory"].items())
        total = sum(result["memory"].values())
        lines.append(
            f"GPU memory for {result['step']['images']} images: {gib(total)} of"
            f" {gib(result['room'])} ({parts}). Largest batch: about {result['largest_batch']}."
        )
    lines.append(
        f"Page cache for all photos: {gib(result['page_cache'])} a node. A checkpoint:"
        f" {gib(result['checkpoint'])}. {result['step']['gflop_an_image']:.4g} GFLOP an image."
    )
    lines += [result["verdict"], "Why a range:", *(f"- {why}" for why in setup["reasons"])]
    for line in lines:
        console.print(line, soft_wrap=True)


UNKNOWN = "photos that are not there yet"


def arguments(given: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options of this file, and those of train.py."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are those of train.py, see `python train.py --help`.",
        allow_abbrev=False,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--gpu", choices=tuple(DEVICES), help="a device of the table")
    where.add_argument("--measure", action="store_true", help="rates of this machine")
    parser.add_argument("--gpus", type=int, default=1, help="devices, one process each")
    parser.add_argument("--cores-per-gpu", type=float, default=5, help="CPU cores of each")
    parser.add_argument("--images", type=int, default=1281167, help="photos (without --data)")
    parser.add_argument("--photo-kb", type=float, default=108, help="stored size of a photo")
    parser.add_argument("--published", action="store_true", help="published loader, plain model")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    own, rest = parser.parse_known_args(given)
    for name in ("gpus", "cores_per_gpu", "images", "photo_kb"):
        if getattr(own, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    return own, rest


def planned(own: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """The plan for a command line. Raises ValueError or FileNotFoundError, naming the option."""
    config = parse(rest if "--data" in rest else [*rest, "--data", UNKNOWN])
    config.share_batch(own.gpus)
    on_gpu = bool(own.gpu) or torch.cuda.is_available()
    if config.pipeline.loader == "dali" and on_gpu:
        raise ValueError("--loader dali: its rate on a GPU is not known; plan with ffcv or pil")
    precision = config.run.precision
    if precision == "auto":
        precision = "fp16" if on_gpu else "fp32"
    with torch.device("meta"):
        ibot = build(config.model)
    width = FULL if precision == "fp32" else HALF
    weights = weights_of(ibot.student, ibot.teacher)
    shape = step_shape(config, weights, width, on_gpu, own.published)
    setup = (from_table if own.gpu else from_here)(own, config, shape, precision)
    return plan(shape, setup, config.run.epochs, config.run.shard_optimizer)


def main(given: list[str] | None = None) -> int:
    """0, or 2 for bad input."""
    own, rest = arguments(given)

    def act() -> int:
        result = planned(own, rest)
        show(result, Console(width=110, highlight=False, markup=False))
        if own.json:
            own.json.parent.mkdir(parents=True, exist_ok=True)
            own.json.write_text(json.dumps(result, indent=1))
        return 0

    return run_command(act, writes=False)


if __name__ == "__main__":
    sys.exit(main())
