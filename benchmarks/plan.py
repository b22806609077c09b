"""Estimate how long a run takes on other GPUs, and whether it fits, before you have the machine.

    ibeton plan --arch vit_s --epochs 800 --gpu v100 --gpus 16 --cores-per-gpu 5
    ibeton plan --arch vit_b --gpu a100 --gpus 8 --batch-size 128 --images 14000000
    ibeton plan --arch vit_s --gpu v100 --gpus 16 --measured h100=960  # after some steps on one
    ibeton plan --published --gpu v100 --gpus 16 --cores-per-gpu 5   # the published trainer

Any option of train.py that changes the work (crops, batch, precision, loader) may be given too. The
step is the one that `benchmarks/budget.py` counts on tensors without memory; seconds follow from
rates that were fitted to one H100. With --measured the prediction for that GPU is compared with
what a run reached there, and the plan corrected by the ratio.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ibeton.atomic import write_text
from ibeton.benchmarks.harness.budget_launches import Settings, step_launches
from ibeton.benchmarks.harness.budget_rates import DEVICES, predicted_seconds
from ibeton.benchmarks.harness.measure import counting_kept, figures
from ibeton.command import run_command
from ibeton.model import build
from ibeton.model.config import SWINS
from ibeton.options import Parser, check_output_file
from ibeton.pipeline.loaders import LOADERS, choose_crops
from ibeton.progress import plain_console
from ibeton.training.config import Config, parse
from ibeton.training.precision import DTYPES
from ibeton.training.timing.forecast import checkpoint_bytes, duration, gib, number

MEMORY = {"v100": 32, "a100": 80, "h100": 80}  # GiB
# The ends of the range: other shapes and devices reach less of their rates, or a little more. The
# published trainer may also be that much faster: less is known of it.
SLOWER, FASTER, PUBLISHED_FASTER = 1.3, 1.1, 1.3
ROOM = 1.3  # memory at the peak over what waits for the backward
# The published trainer's own loop took 152.5 ms where ours, without kernels, took 66.5: one H100,
# ViT-S, fp16, batch 64, commit 216b8a1, November 2026, torch 2.11. Its memory at the peak was 16.2
# GiB; `step_cost` counts 5.2 for the backward of ours.
PUBLISHED = 152.5 / 66.5
PUBLISHED_MEMORY = 2.3
# Photos/s of one core with the published code: ImageNet photos (0.2 megapixels), 2 x 224 + 10 x 96
# views, on one older machine, with all hyper-threads busy and with one. Those of our loaders are in
# their table, pipeline/loaders/kinds.py.
PUBLISHED_LOADER = (18, 23)


def step_cost(config: Config, gpu: str, precision: str, kernels: bool) -> tuple[float, float]:
    """Predicted seconds of a step, and the bytes that it keeps for its backward."""
    images = config.pipeline.batch_size // config.model.micro_steps
    local, dtype = config.pipeline.local_crops_size, DTYPES[precision]
    device = DEVICES[gpu]
    settings = Settings(config.model, images, local, dtype, kernels, device.capability)
    with counting_kept() as kept:
        launches = step_launches(settings)
        return predicted_seconds(launches, device) * config.model.micro_steps, float(kept())


def step_seconds(
    own: argparse.Namespace, config: Config, precision: str
) -> tuple[tuple[float, float], float]:
    """Seconds of a step, slow and fast, and the bytes that it keeps for its backward."""
    seconds, activations = step_cost(config, own.gpu, precision, kernels=not own.published)
    if own.published:
        ends = SLOWER * PUBLISHED * seconds, PUBLISHED * seconds / PUBLISHED_FASTER
        return ends, PUBLISHED_MEMORY * activations
    if own.measured is None:
        return (SLOWER * seconds, seconds / FASTER), activations
    kind, images_per_s = own.measured
    predicted = step_cost(config, kind, precision, kernels=True)[0]
    seconds *= config.pipeline.batch_size / images_per_s / predicted
    return (seconds if kind == own.gpu else SLOWER * seconds, seconds), activations


def plan(own: argparse.Namespace, config: Config, precision: str) -> dict[str, Any]:
    """All figures, as they go into the JSON file: pairs from slow to fast, rates of all GPUs."""
    with torch.device("meta"):
        ibot = build(config.model)
    student, teacher = (
        4.0 * sum(p.numel() for p in net.parameters()) for net in (ibot.student, ibot.teacher)
    )
    checkpoint = checkpoint_bytes(ibot, config.run.optimizer)
    shards = own.gpus if config.run.shard_optimizer else 1
    seconds, activations = step_seconds(own, config, precision)
    model = [own.gpus * config.pipeline.batch_size / s for s in seconds]
    rates = PUBLISHED_LOADER if own.published else loader_rates(config)
    loader = [own.gpus * own.cores_per_gpu * rate for rate in rates]
    speed = [min(pair) for pair in zip(model, loader, strict=True)]
    return {
        **{"gpu": own.gpu, "gpus": own.gpus, "epochs": config.run.epochs},
        **{"published": own.published, "measured": own.measured},
        **{"batch_size": config.pipeline.batch_size, "checkpoint": checkpoint},
        **{"model_images_per_s": model, "loader_images_per_s": loader, "images_per_s": speed},
        "hours": [own.images * config.run.epochs / rate / 3600 for rate in speed],
        "limit": ["loader" if of < to else "model" for of, to in zip(loader, model, strict=True)],
        # Weights of both networks, the student's gradients, and its moments in parts
        "weights": 2 * student + teacher + (checkpoint - student - teacher) / shards,
        "activations": activations,
        "page_cache": own.images * own.photo_kb * 1000,
    }


def loader_rates(config: Config) -> tuple[float, float]:
    """Photos/s of one core, from slow to fast, of the loader that a run with a .beton file on a GPU
    takes. Raises ValueError for one that was not measured."""
    known = {name: kind for name, kind in LOADERS.items() if kind.decode_rate}
    name = config.pipeline.loader
    if name not in (*known, "auto"):
        raise ValueError(
            f"--loader {name}: its rate on a GPU is not known; plan with {' or '.join(known)}"
        )
    kind = known.get(name) or max(known.values(), key=lambda kind: kind.crop_rate)
    on_gpu = choose_crops(config.pipeline, kind, torch.device("cuda")) == "gpu"
    rate = kind.decode_rate if on_gpu else kind.crop_rate
    return rate / SLOWER, rate


def show(result: dict[str, Any], console: Console) -> None:
    """A table from slow to fast, then memory and where the figures come from."""
    table = figures(f"{result['gpus']} x {result['gpu']}", "slow", "fast")
    table.add_row("images/s", *map(number, result["images_per_s"]))
    table.add_row("  of the model alone", *map(number, result["model_images_per_s"]))
    table.add_row("  of the loader alone", *map(number, result["loader_images_per_s"]))
    longest = max(result["hours"])
    table.add_row(
        f"{result['epochs']} epochs", *(duration(3600 * h, 3600 * longest) for h in result["hours"])
    )
    table.add_row("limited by the", *result["limit"])
    console.print(table)
    weights, activations = result["weights"], result["activations"]
    room = 2.0**30 * MEMORY[result["gpu"]]
    fits = "fits" if weights + ROOM * activations < room else "may not fit"
    for line in (
        f"Memory of a GPU: {gib(weights)} of weights, gradients and moments, {gib(activations)} of"
        f" activations for {result['batch_size']} images, of {gib(room)}: {fits}.",
        f"Page cache for all photos: {gib(result['page_cache'])} per node. A checkpoint:"
        f" {gib(result['checkpoint'])}.",
        "Predicted from the step's launches and rates fitted to one H100; rates of other GPUs are"
        f" data sheets'. {ends(result)} Communication between GPUs is not modeled.",
    ):
        console.print(line, soft_wrap=True)


def ends(result: dict[str, Any]) -> str:
    """What slow and fast stand for."""
    if result["published"]:
        return (
            f"The published loop takes {PUBLISHED:.2f} times our step without kernels (one H100)."
            f" Slow: {SLOWER:.0%} of the predicted time. Fast: {1 / PUBLISHED_FASTER:.0%}."
        )
    if result["measured"] is None:
        return f"Slow: {SLOWER:.0%} of the predicted time. Fast: {1 / FASTER:.0%}."
    kind, images_per_s = result["measured"]
    said = f"Corrected by the {number(images_per_s)} images/s measured on one {kind}."
    return said if kind == result["gpu"] else f"{said} Slow: {SLOWER:.0%} of the time."


def measured(text: str) -> tuple[str, float]:
    """ "h100=960" -> the kind of GPU and images/s."""
    kind, _, rate = text.partition("=")
    try:
        images_per_s = float(rate)
    except ValueError:
        images_per_s = 0.0
    if kind not in DEVICES or not 0 < images_per_s < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a GPU and its images/s, such as h100=960"
        )
    return kind, images_per_s


def arguments(given: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options of this file, and those of train.py."""
    parser = Parser(
        description=__doc__,
        epilog="All other options are those of train.py, see `ibeton train --help`.",
    )
    parser.add_argument("--gpu", choices=tuple(DEVICES), required=True, help="kind of GPU")
    parser.add_argument("--gpus", type=int, default=1, help="how many, one process each")
    parser.add_argument("--cores-per-gpu", type=float, default=5, help="CPU cores of each")
    parser.add_argument("--images", type=int, default=1281167, help="photos of an epoch")
    parser.add_argument("--photo-kb", type=float, default=108, help="stored size of a photo")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--published", action="store_true", help="the published trainer instead")
    model.add_argument(
        "--measured",
        type=measured,
        metavar="GPU=IMAGES/S",
        help="what a run with the same options reached on one GPU without waiting for data",
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    own, rest = parser.parse_known_args(given)
    for name in ("gpus", "cores_per_gpu", "images", "photo_kb"):
        if getattr(own, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    return own, rest


def planned(own: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """The plan for a command line. Raises ValueError, naming the option."""
    config = parse(rest if "--data" in rest else [*rest, "--data", "photos that are not there yet"])
    config.share_batch(own.gpus)
    if config.model.arch in SWINS:
        raise ValueError(f"--arch {config.model.arch}: no step of a Swin was measured on a GPU")
    precision = "fp16" if config.run.precision == "auto" else config.run.precision
    if precision not in ("fp16", "bf16") or (precision == "bf16" and own.gpu == "v100"):
        raise ValueError(f"--precision {precision}: plans are for fp16, or bf16 on newer GPUs")
    return plan(own, config, precision)


def main(given: list[str] | None = None) -> int:
    """0, or 2 for bad input."""
    own, rest = arguments(given)

    def act() -> int:
        if own.json and (own.json.exists() or own.json.suffix != ".json"):
            check_output_file("--json", own.json, ".json", begins=b'{\n "gpu": ')
        result = planned(own, rest)
        show(result, plain_console())
        if own.json:
            own.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(own.json, json.dumps(result, indent=1))
        return 0

    return run_command(act, writes=False)


if __name__ == "__main__":
    sys.exit(main())
