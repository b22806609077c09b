"""About how long will a run take on other GPUs, and will it fit: before there is a machine.

    ibeton plan --arch vit_s --epochs 800 --gpu v100 --gpus 16 --cores-per-gpu 5
    ibeton plan --arch vit_b --gpu a100 --gpus 8 --batch-size 128 --images 14000000
    ibeton plan --published --gpu v100 --gpus 16 --cores-per-gpu 5   # the published trainer

Any option of train.py that changes the work (crops, batch, precision, loader) may be given too. One
step measured on an H100 is scaled by operations, tokens and data sheets; the range says how far
that carries. A run prints a forecast of its own, from its first steps, which is better.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ibeton.benchmarks.harness.plan_devices import (
    DEVICES,
    PASSES,
    PUBLISHED,
    SPREAD,
    STEP,
    STEP_ARCH,
    STEP_DEVICE,
    STEP_GFLOP,
    Device,
    Range,
    loader_rate,
)
from ibeton.command import run_command
from ibeton.model import IBOT, build
from ibeton.model.config import SWINS
from ibeton.options import Parser
from ibeton.pipeline.loaders import LOADERS, choose_crops
from ibeton.training.config import Config, from_values, parse
from ibeton.training.timing.forecast import checkpoint_bytes, duration, gib, number

UNKNOWN = "photos that are not there yet"


def views_of(config: Config) -> list[tuple[int, int]]:
    """(views per image, tokens per view) of each crop size, global ones first."""
    data = config.pipeline
    sizes = (
        (data.global_crops_number, data.global_crops_size),
        (data.local_crops_number, data.local_crops_size),
    )
    return [(number, 1 + (size // data.patch_size) ** 2) for number, size in sizes]


def step_gflop(config: Config) -> float:
    """GFLOP per image of a step's matrix products and attention: the teacher's forward on global
    views, the student's on all, and the backward, which multiplies twice as much, and 2.5 times in
    fused attention."""
    data, views = config.pipeline, views_of(config)
    global_tokens = views[0][0] * views[0][1]
    masked = sum(data.pred_ratio) / len(data.pred_ratio) * (global_tokens - views[0][0])
    rows = sum(number for number, _ in views) + masked  # what the loss looks at
    products, attention = _forward_gflop(config, views, rows, rows)
    teacher = _forward_gflop(config, views[:1], global_tokens, views[0][0] + masked)
    return sum(teacher) + 3 * products + 3.5 * attention


def _forward_gflop(
    config: Config, views: list[tuple[int, int]], last: float, rows: float
) -> tuple[float, float]:
    """Products and attention of one network: `last` tokens reach the last MLP and the head, `rows`
    the prototypes."""
    model = config.model
    channels, depth, _ = model.backbone_shape()
    tokens, pairs = (sum(n * t**power for n, t in views) for power in (1, 2))
    patches = tokens - sum(number for number, _ in views)
    head = [channels, *[model.hidden_dim] * (model.head_layers - 1), model.bottleneck_dim]
    multiply_adds = (
        patches * 3 * model.patch_size**2 * channels
        + depth * 4 * tokens * channels**2
        + ((depth - 1) * tokens + last) * 2 * model.mlp_ratio * channels**2
        + last * sum(k * n for k, n in itertools.pairwise(head))
        + rows * model.bottleneck_dim * model.out_dim
    )
    return 2e-9 * multiply_adds, 2e-9 * depth * 2 * pairs * channels


def traffic(config: Config) -> float:
    """Tokens x channels x blocks per image: what passes over memory, and activations, grow with."""
    channels, depth, _ = config.model.backbone_shape()
    return float(sum(number * tokens for number, tokens in views_of(config)) * channels * depth)


def step_seconds(config: Config, gflop: float, device: Device, precision: str) -> Range:
    """Slow and fast seconds of a step, from the measured one."""
    base, images = DEVICES[STEP_DEVICE], config.pipeline.batch_size
    share = images / STEP.images
    work = gflop / STEP_GFLOP * base.peak["fp16"] / device.peak[precision]
    width = 2 if precision == "fp32" else 1
    moved = traffic(config) / traffic(_measured_config()) * base.bandwidth / device.bandwidth
    slow, fast = (
        share * (STEP.products_ms * work + passes * width * STEP.passes_ms * moved) * spread / 1000
        for passes, spread in zip(PASSES, SPREAD, strict=True)
    )
    return slow, fast


def memory(config: Config, ibot: IBOT, precision: str, gpus: int) -> dict[str, float]:
    """Bytes: of weights, gradients and moments, which are known; and of activations, scaled from
    the measured step."""
    base, options = _measured_config(), config.run
    with torch.device("meta"):
        measured = STEP.gib * 2**30 - _fixed_bytes(build(base.model), "adamw", 1)
    share = config.pipeline.batch_size / config.model.micro_steps / STEP.images
    width = 2 if precision == "fp32" else 1
    grows = measured * share * width * traffic(config) / traffic(base)
    fixed = _fixed_bytes(ibot, options.optimizer, gpus if options.shard_optimizer else 1)
    return {"fixed": fixed, "activations": grows}


def _fixed_bytes(ibot: IBOT, optimizer: str, shards: int) -> float:
    """Weights of both networks, the student's gradients, and its moments in `shards` parts, all
    float32."""
    student, teacher = (
        4.0 * sum(p.numel() for p in network.parameters())
        for network in (ibot.student, ibot.teacher)
    )
    moments = checkpoint_bytes(ibot, optimizer) - student - teacher
    return 2 * student + teacher + moments / shards


def _measured_config() -> Config:
    return from_values({"arch": STEP_ARCH, "data": UNKNOWN, "batch_size": STEP.images})


def plan(own: argparse.Namespace, config: Config, precision: str) -> dict[str, Any]:
    """All figures, as they go into the JSON file. Rates are of all GPUs together."""
    device, images = DEVICES[own.gpu], config.pipeline.batch_size
    with torch.device("meta"):
        ibot = build(config.model)
    gflop = step_gflop(config)
    slow, fast = step_seconds(config, gflop, device, precision)
    if own.published:
        slow, fast = slow * PUBLISHED, slow / SPREAD[0] * SPREAD[1] * PUBLISHED
    kind = "published" if own.published else loader_kind(config)
    pixels = sum(view.size**2 for view in config.pipeline.views())
    loader = [own.gpus * own.cores_per_gpu * rate for rate in loader_rate(kind, pixels)]
    model = [own.gpus * images / seconds for seconds in (slow, fast)]
    speed = [min(pair) for pair in zip(model, loader, strict=True)]
    needed = memory(config, ibot, precision, own.gpus)
    return {
        "gpu": own.gpu,
        "gpus": own.gpus,
        "gflop_per_image": gflop,
        "model_images_per_s": model,
        "loader_images_per_s": loader,
        "images_per_s": speed,
        "hours": [own.images * config.run.epochs / rate / 3600 for rate in speed],
        "limit": ["loader" if of < to else "model" for of, to in zip(loader, model, strict=True)],
        "memory": needed,
        "device_memory": device.memory * 2.0**30,
        "page_cache": own.images * own.photo_kb * 1000,
        "checkpoint": checkpoint_bytes(ibot, config.run.optimizer),
        "epochs": config.run.epochs,
        "batch_size": images,
    }


def loader_kind(config: Config) -> str:
    """The loader that a run with a .beton file on a GPU would take, by its name in LOADERS. Raises
    ValueError for DALI, which was not measured on a GPU."""
    name = config.pipeline.loader
    if name == "dali":
        raise ValueError("--loader dali: its rate on a GPU is not known; plan with ffcv or pil")
    name = "ffcv" if name == "auto" else name
    where = choose_crops(config.pipeline, LOADERS[name], torch.device("cuda"))
    return "ffcv on cpu" if (name, where) == ("ffcv", "cpu") else name


def show(result: dict[str, Any], console: Console) -> None:
    """A table from slow to fast, then memory and what limits."""
    source = DEVICES[result["gpu"]].source
    console.print(f"{result['gpus']} x {result['gpu']} ({source})", soft_wrap=True)
    table = Table("", "slow", "fast")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("images/s", *map(number, result["images_per_s"]))
    table.add_row("  of the model alone", *map(number, result["model_images_per_s"]))
    table.add_row("  of the loader alone", *map(number, result["loader_images_per_s"]))
    table.add_row(f"{result['epochs']} epochs", *(duration(3600 * h) for h in result["hours"]))
    table.add_row("limited by the", *result["limit"])
    console.print(table)
    for line in words(result):
        console.print(line, soft_wrap=True)


def words(result: dict[str, Any]) -> list[str]:
    """Memory, disk, and where the figures come from."""
    fixed, grows = result["memory"]["fixed"], result["memory"]["activations"]
    room = result["device_memory"]
    fits = "fits" if fixed + 1.3 * grows < room else "may not fit"
    lines = [
        f"Memory of a GPU: {gib(fixed)} of weights, gradients and moments, about {gib(grows)}"
        f" (+- 30 %) of activations for {result['batch_size']} images, of {gib(room)}: {fits}.",
        f"Page cache for all photos: {gib(result['page_cache'])} per node. A checkpoint:"
        f" {gib(result['checkpoint'])}. {number(result['gflop_per_image'])} GFLOP per image.",
    ]
    if "loader" in result["limit"]:
        share = result["model_images_per_s"][0] / result["loader_images_per_s"][0]
        lines.append(
            f"The loader limits, or may: the model needs {number(math.ceil(10 * share) / 10)} times"
            " these cores at the slow end."
        )
    return [
        *lines,
        f"Scaled from one measured step (ViT-S, batch {STEP.images}, fp16, one H100:"
        f" {number(STEP.images_per_s)} images/s) by operations, tokens and data sheets. Slow: as"
        " measured, and 30 % for other shapes and devices. Fast: with most passes over memory"
        " fused, which is to be measured. The exchange between GPUs is not looked at.",
    ]


def arguments(given: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options of this file, and those of train.py."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are those of train.py, see `ibeton train --help`.",
    )
    parser.add_argument("--gpu", choices=tuple(DEVICES), required=True, help="kind of GPU")
    parser.add_argument("--gpus", type=int, default=1, help="how many, one process each")
    parser.add_argument("--cores-per-gpu", type=float, default=5, help="CPU cores of each")
    parser.add_argument("--images", type=int, default=1281167, help="photos of an epoch")
    parser.add_argument("--photo-kb", type=float, default=108, help="stored size of a photo")
    parser.add_argument("--published", action="store_true", help="the published trainer instead")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    own, rest = parser.parse_known_args(given)
    for name in ("gpus", "cores_per_gpu", "images", "photo_kb"):
        if getattr(own, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    return own, rest


def planned(own: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """The plan for a command line. Raises ValueError, naming the option."""
    config = parse(rest if "--data" in rest else [*rest, "--data", UNKNOWN])
    config.share_batch(own.gpus)
    if config.model.arch in SWINS:
        raise ValueError(f"--arch {config.model.arch}: no step of a Swin was measured on a GPU")
    precision = "fp16" if config.run.precision == "auto" else config.run.precision
    if precision not in (peaks := DEVICES[own.gpu].peak):
        raise ValueError(f"--precision {precision}: a {own.gpu} has {', '.join(peaks)}")
    return plan(own, config, precision)


def main(given: list[str] | None = None) -> int:
    """0, or 2 for bad input."""
    own, rest = arguments(given)

    def act() -> int:
        result = planned(own, rest)
        show(result, Console(highlight=False, markup=False))
        if own.json:
            own.json.parent.mkdir(parents=True, exist_ok=True)
            own.json.write_text(json.dumps(result, indent=1))
        return 0

    return run_command(act, writes=False)


if __name__ == "__main__":
    sys.exit(main())
