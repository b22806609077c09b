"""One training step of the model, in its parts, against the same step written the obvious way.

    python benchmarks/model.py                       # ViT-S/16, 2 x 224 + 10 x 96, batch 8
    python benchmarks/model.py --arch vit_b --batch-size 64 --precision fp16 --device cuda

The baseline is `model.reference`, which the tests hold equal to the fast path. Both sides have the
same weights, batch and precision; their rounds take turns in one process, so that a busy machine
slows both. Memory is the peak above the idle process, on a CPU of a fresh process for each side.
"""

import argparse
import ctypes
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ibeton.benchmarks.harness import measure as harness
from ibeton.benchmarks.harness.measure import quartiles, ratios, spread
from ibeton.benchmarks.harness.model_step import (
    PARTS,
    Baseline,
    Batch,
    Side,
    Times,
    on_gpu,
)
from ibeton.command import run_or_exit
from ibeton.distributed import make_current
from ibeton.model import ModelConfig
from ibeton.progress import plain_console
from ibeton.training.precision import DTYPES
from ibeton.training.timing.flops import flop_counter, matrix_rate

NAMES = ("ours", "baseline")


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit("memory can be measured on Linux only")


def peak_memory(name: str, args: argparse.Namespace) -> int:
    """Bytes above the idle process at the peak of a step. Idle: weights and the optimizer's moments
    are there, gradients and activations are not."""
    if args.threads:
        torch.set_num_threads(args.threads)
    side, batch = make_side(name, args), make_batch(args)
    side.step(batch)
    side.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if on_gpu(side.device):
        torch.cuda.reset_peak_memory_stats()
        idle = torch.cuda.memory_allocated()
        side.step(batch)
        return torch.cuda.max_memory_allocated() - idle
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator holds back is no one's use
    idle = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    side.step(batch)
    return resident("VmHWM") - idle


def model_config(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        arch=args.arch, out_dim=args.out_dim, local_crops_number=args.local_crops_number,
        drop_path=args.drop_path, checkpoint_blocks=args.checkpoint_blocks,
    )  # fmt: skip


def make_side(name: str, args: argparse.Namespace) -> Side:
    kind = Baseline if name == "baseline" else Side
    return kind(model_config(args), args.device, DTYPES[args.precision])


def make_batch(args: argparse.Namespace) -> Batch:
    return Batch(model_config(args), args.batch_size, 96, args.device)


def compare(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Ours against the baseline: time by part, memory, FLOPs."""
    batch, on_cpu = make_batch(args), args.device == "cpu"
    sides = {name: make_side(name, args) for name in NAMES}
    steps: dict[str, Callable[[], Times]] = {
        name: functools.partial(side.step, batch) for name, side in sides.items()
    }
    dtype = DTYPES[args.precision]
    steps["peak"] = lambda: {"flops": matrix_rate(torch.device(args.device), dtype)}
    times = harness.in_turns(steps, args.rounds)
    title = f"seconds a step, {args.arch}, batch {args.batch_size}, {args.precision}"
    table = harness.figures("part", *NAMES, "baseline / ours", title=title)

    def add(part: str, values: dict[str, list[float]]) -> None:
        ratio = ratios(values, "baseline", "ours")
        table.add_row(part, *map(spread, values.values()), spread(ratio))

    for part in PARTS:
        add(part, {name: [t[part] for t in times[name]] for name in NAMES})
    table.add_section()
    whole = {name: [sum(t[part] for part in PARTS) for t in times[name]] for name in NAMES}
    add("step", whole)
    if on_cpu:  # a busy machine disturbs it less
        add("CPU seconds", {name: [t["busy"] for t in times[name]] for name in NAMES})
    add("images/s", {name: [args.batch_size / t for t in whole[name]] for name in NAMES})
    counts = {}
    for name, side in sides.items():
        with flop_counter() as counter:
            side.step(batch)
        counts[name] = float(counter.get_total_flops())
    peak = quartiles([t["flops"] for t in times["peak"]])[0]
    table.add_row("GFLOP", *(f"{counts[n] / 1e9:.4g}" for n in NAMES), "")
    shares = (counts[n] / quartiles(whole[n])[0] / peak for n in NAMES)
    table.add_row(f"of {peak / 1e9:.4g} GFLOP/s", *(f"{s:.1%}" for s in shares), "")
    del sides, side, steps
    memory = {
        name: harness.apart(peak_memory, name, args) if on_cpu else peak_memory(name, args)
        for name in NAMES
    }
    share = f"ours: {memory['ours'] / memory['baseline']:.2f} of it"
    table.add_row("peak MiB above idle", *(f"{m / 2**20:.0f}" for m in memory.values()), share)
    console.print(table)
    return {"times": times, "flops": counts, "peak_flops": peak, "memory": memory}


def arguments() -> argparse.Namespace:
    parser, count = harness.make_parser(__doc__), harness.integer(1)
    parser.add_argument("--arch", default="vit_s")
    parser.add_argument("--batch-size", type=count, default=8)
    parser.add_argument("--local-crops-number", type=harness.integer(0), default=10)
    parser.add_argument("--out-dim", type=count, default=8192)
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--checkpoint-blocks", action="store_true", help="ours: less memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads", type=harness.integer(0), default=0, help="on a CPU (0: torch's choice)"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    make_current(torch.device(args.device))
    if args.threads:
        torch.set_num_threads(args.threads)
    console = plain_console(width=110)
    about = harness.machine("torch", "triton", device=args.device)
    about["threads"] = torch.get_num_threads()
    results = {"settings": {**vars(args), "json": None}, "comparison": compare(args, console)}
    harness.conclude(console, about, args.rounds, args.json, **results)


if __name__ == "__main__":
    run_or_exit(main)
