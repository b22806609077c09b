"""One training step of the model, in its parts, against the same step written the obvious way.

    python benchmarks/model.py                       # ViT-S/16, 2 x 224 + 10 x 96, batch 8
    python benchmarks/model.py --arch vit_b --batch-size 64 --precision fp16 --device cuda

The baseline is `model.reference`, which the tests hold equal to the fast path: each crop size in
its own pass, softmax of attention in memory, head on every token, loss pair by pair, plain AdamW,
one parameter after the other. Both sides have the same weights, batch and precision; their rounds
take turns in one process, so that a busy machine slows both. Memory is the peak above the idle
process, on a CPU of a fresh process for each side. The last table takes one change away at a time.
"""

import argparse
import ctypes
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":  # not this folder, where files bear the names of packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import model.blocks
from benchmarks.measure import in_words, machine, spread
from model import ModelConfig, build
from model.flops import flop_counter
from model.ibot import IBOT
from model.kernels.cross_entropy import cross_entropy_reference
from model.kernels.gelu_linear import gelu_linear_reference
from model.kernels.norm_linear import norm_linear_reference
from model.masking import masked_patches
from model.network import Logits, Network, Targets, views_one_by_one
from model.optim import build_optimizer, clip_gradients, parameter_groups
from model.reference import loss_reference, network_reference, update_teacher_reference
from model.steps import set_rates
from model.vit import VisionTransformer

PARTS = ("teacher", "student", "loss", "backward", "optimizer", "ema")
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Times = dict[str, float]


class Batch:
    """Random crops, and block-like masks: half of the views, a share of 0.1 to 0.5 of each."""

    def __init__(self, config: ModelConfig, images: int, local_size: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        views, size = config.global_crops_number, config.image_size
        grid = size // config.patch_size
        self.global_crops = torch.randn(views, images, 3, size, size, generator=generator)
        local_shape = (config.local_crops_number, images, 3, local_size, local_size)
        self.local_crops = torch.randn(local_shape, generator=generator)
        share = torch.linspace(0.1, 0.5, max(1, views * images // 2))
        share = torch.cat([share, torch.zeros(views * images - len(share))])
        share = share[torch.randperm(len(share), generator=generator)].view(views, images, 1, 1)
        self.masks = torch.rand(views, images, grid, grid, generator=generator) < share
        self.global_crops, self.local_crops = (
            t.to(device) for t in (self.global_crops, self.local_crops)
        )


class Side:
    """One way to take a step; `step` gives the seconds of its parts."""

    def __init__(self, config: ModelConfig, device: str, dtype: torch.dtype | None) -> None:
        torch.manual_seed(0)
        self.ibot: IBOT = build(config).to(device)
        self.device, self.dtype = device, dtype
        self.scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)
        self.optimizer = self.make_optimizer()
        set_rates(self.optimizer, 1e-4, 0.04)

    def make_optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.ibot.student)

    def teacher(self, batch: Batch) -> Any:
        patches = masked_patches(batch.masks, batch.global_crops.device)
        return patches, self.ibot.teacher.targets(batch.global_crops, patches.places)

    def student(self, batch: Batch, teacher: Any) -> Logits:
        masks = batch.masks.to(batch.global_crops.device, non_blocking=True)
        return self.ibot.student(batch.global_crops, batch.local_crops, masks, teacher[0].places)

    def loss(self, batch: Batch, student: Logits, teacher: Any) -> Tensor:
        return self.ibot.loss(student, teacher[1], teacher[0], 0)["loss"]

    def clip(self) -> None:
        clip_gradients(self.ibot.student.parameters(), 3.0)

    def ema(self) -> None:
        self.ibot.update_teacher(0.996)

    def step(self, batch: Batch) -> Times:
        clock = Clock(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None):
            with torch.no_grad():
                teacher = self.teacher(batch)
            clock.ends("teacher")
            student = self.student(batch, teacher)
            clock.ends("student")
            loss = self.loss(batch, student, teacher)
            clock.ends("loss")
        del student, teacher
        self.scaler.scale(loss).backward()
        clock.ends("backward")
        self.ibot.loss.update_centers()
        self.scaler.unscale_(self.optimizer)
        self.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        clock.ends("optimizer")
        self.ema()
        clock.ends("ema")
        return clock.times


class Baseline(Side):
    """The step written the obvious way."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(self.ibot.student), foreach=False)

    def teacher(self, batch: Batch) -> Any:
        return network_reference(self.ibot.teacher, batch.global_crops)

    def student(self, batch: Batch, teacher: Any) -> Logits:
        masks = batch.masks.to(batch.global_crops.device)
        return network_reference(self.ibot.student, batch.global_crops, batch.local_crops, masks)

    def loss(self, batch: Batch, student: Logits, teacher: Any) -> Tensor:
        masks = batch.masks.to(batch.global_crops.device)
        return loss_reference(self.ibot.loss, student, teacher[0], teacher[1], masks, 0)["loss"]

    def clip(self) -> None:
        for parameter in self.ibot.student.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_((3.0 / (parameter.grad.norm() + 1e-6)).clamp(max=1))

    def ema(self) -> None:
        update_teacher_reference(self.ibot, 0.996)


class Clock:
    """Seconds of consecutive parts, the device's work included."""

    def __init__(self, device: str) -> None:
        self.device, self.times = device, Times()
        self.last, self.busy = self._now(), time.process_time()

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def ends(self, part: str) -> None:
        now = self._now()
        self.times[part] = now - self.last
        self.times["busy"] = time.process_time() - self.busy  # so far, of all threads
        self.last = now


def attention_reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1) @ value


def every_patch(network: Network, *arguments: Any) -> Logits:
    """`Network.forward` with the head on every patch; the masked ones are taken afterwards."""
    *views, places = arguments
    cls, patch, local_cls = FORWARD(network, *views)
    return cls, patch.flatten(0, 1)[places], local_cls


def every_target(network: Network, global_crops: Tensor, places: Tensor) -> Targets:
    cls, patch, _ = FORWARD(network, global_crops)
    return Targets(cls, patch.flatten(0, 1)[places], patch.float().mean(dim=(0, 1)))


def ungathered(kept: Tensor, token_of: Tensor, rate: float, shapes: Any) -> Any:
    factor = kept[token_of].unsqueeze(1) / (1 - rate)
    return model.blocks.Kept(None, shapes, 1 / (1 - rate), factor)


def last_block_whole(vit: Any, x: Tensor, shapes: Any, rows: Tensor | None = None) -> Tensor:
    x = BLOCKS(vit, x, shapes)
    return x if rows is None else x.index_select(0, rows)


def one_by_one(network: Network, *arguments: Any) -> Any:
    return views_one_by_one(network.backbone, *arguments)


FORWARD = Network.forward
BLOCKS = VisionTransformer._blocks
# What to put back, to see what a change brings: name -> (where, what was there before the change).
CHANGES: dict[str, list[tuple[str, Any]]] = {
    "head on masked patches alone": [
        ("model.network.Network.forward", every_patch),
        ("model.network.Network.targets", every_target),
    ],
    "fused loss": [("model.loss.cross_entropy", cross_entropy_reference)],
    "scaled_dot_product_attention": [
        ("model.blocks.F.scaled_dot_product_attention", attention_reference)
    ],
    "crop sizes packed": [("model.network.Network._views", one_by_one)],
    "norm and GELU computed again": [
        ("model.blocks.norm_linear", norm_linear_reference),
        ("model.blocks.gelu_linear", gelu_linear_reference),
    ],
    "MLP of the last block on wanted tokens": [
        ("model.vit.VisionTransformer._blocks", last_block_whole)
    ],
    "dropped samples left out (CPU)": [("model.blocks._gathered", ungathered)],
}


@contextmanager
def without(change: str | None) -> Iterator[None]:
    """The model as it is without one of CHANGES."""
    patches = [mock.patch(where, what) for where, what in CHANGES.get(change or "", [])]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def flops(side: Side, batch: Batch) -> float:
    """Floating-point operations of one step's matrix products and attention."""
    with flop_counter() as counter:
        side.step(batch)
    return float(counter.get_total_flops())


def peak_flops(device: str, dtype: torch.dtype | None) -> float:
    """FLOP/s of a large matrix product in the precision of the run."""
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype or torch.float32)
    clock = Clock(device)
    torch.mm(a, a)
    clock.ends("product")
    return 2 * n**3 / clock.times["product"]


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit("memory can be measured on Linux only")


def peak_memory(side: Side, batch: Batch) -> int:
    """Bytes above the idle process at the peak of a step. Idle: weights and the optimiser's moments
    are there, gradients and activations are not."""
    side.step(batch)
    side.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if side.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        idle = torch.cuda.memory_allocated()
        side.step(batch)
        return torch.cuda.max_memory_allocated() - idle
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator holds back is no one's use
    idle = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    side.step(batch)
    return resident("VmHWM") - idle


def memory_of(name: str, args: argparse.Namespace) -> int:
    """`peak_memory` of a side; on a CPU in a process of its own."""
    if args.device == "cuda":
        with without(name):
            return peak_memory(make_side(name, args), make_batch(args))
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(out.stdout.split()[-1])


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


def rounds(steps: dict[str, Callable[[], Times]], count: int) -> dict[str, list[Times]]:
    """`count` timed steps of each, taking turns, after one untimed."""
    results: dict[str, list[Times]] = {name: [] for name in steps}
    for i in range(count + 1):
        for name, step in steps.items():
            times = step()
            if i:
                results[name].append(times)
    return results


def total(times: list[Times]) -> list[float]:
    return [sum(parts[p] for p in PARTS if p in parts) for parts in times]


def ratio(slow: list[float], fast: list[float]) -> list[float]:
    return [a / b for a, b in zip(slow, fast, strict=True)]


def compare(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Ours against the baseline: time by part, memory, FLOPs."""
    batch = make_batch(args)
    sides = {"ours": make_side("ours", args), "baseline": make_side("baseline", args)}
    steps: dict[str, Callable[[], Times]] = {
        name: functools.partial(side.step, batch) for name, side in sides.items()
    }
    dtype = DTYPES[args.precision]
    steps["peak"] = lambda: {"flops": peak_flops(args.device, dtype)}
    times = rounds(steps, args.rounds)
    ours, baseline = total(times["ours"]), total(times["baseline"])
    table = Table(title=f"seconds a step, {args.arch}, batch {args.batch_size}, {args.precision}")
    for heading in ("part", "ours", "baseline", "baseline / ours"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part in PARTS:
        values = [[t[part] for t in times[name]] for name in ("ours", "baseline")]
        table.add_row(part, *map(spread, values), spread(ratio(values[1], values[0])))
    table.add_section()
    table.add_row("step", spread(ours), spread(baseline), spread(ratio(baseline, ours)))
    if args.device == "cpu":  # a busy machine disturbs it less
        busy = [[t["busy"] for t in times[name]] for name in ("ours", "baseline")]
        table.add_row("CPU seconds", *map(spread, busy), spread(ratio(busy[1], busy[0])))
    speed = [[args.batch_size / t for t in side] for side in (ours, baseline)]
    table.add_row("images/s", *map(spread, speed), spread(ratio(speed[1], speed[0])))
    counts = {name: flops(side, batch) for name, side in sides.items()}
    peak = statistics.median(t["flops"] for t in times["peak"])
    table.add_row("GFLOP", *(f"{counts[n] / 1e9:.4g}" for n in counts), "")
    shares = [
        counts[n] / statistics.median(t) / peak
        for n, t in zip(counts, (ours, baseline), strict=True)
    ]
    table.add_row(f"of {peak / 1e9:.4g} GFLOP/s", *(f"{s:.1%}" for s in shares), "")
    del sides, steps
    memory = {name: memory_of(name, args) for name in ("ours", "baseline")}
    share = memory["ours"] / memory["baseline"]
    table.add_row(
        "peak MiB above idle",
        *(f"{m / 2**20:.0f}" for m in memory.values()),
        f"ours: {share:.2f} of it",
    )
    console.print(table)
    return {"times": times, "flops": counts, "peak_flops": peak, "memory": memory}


def ablate(args: argparse.Namespace, console: Console, whole_memory: int) -> dict[str, Any]:
    """Ours without one change at a time."""
    batch = make_batch(args)
    side = make_side("ours", args)

    def step(change: str | None) -> Times:
        with without(change):
            return side.step(batch)

    steps: dict[str, Callable[[], Times]] = {"ours": functools.partial(step, None)}
    steps |= {change: functools.partial(step, change) for change in CHANGES}
    times = rounds(steps, args.rounds)
    memory = {change: memory_of(change, args) for change in CHANGES}
    table = Table(title="ours without one change: time and memory over ours with all")
    for heading in ("without", "time", "CPU time", "memory"):
        table.add_column(heading, justify="left" if heading == "without" else "right")
    for change in CHANGES:
        relative = ratio(total(times[change]), total(times["ours"]))
        busy = [[t["busy"] for t in times[name]] for name in (change, "ours")]
        part = f"{memory[change] / whole_memory:.2f}"
        table.add_row(change, spread(relative), spread(ratio(*busy)), part)
    console.print(table)
    return {"times": times, "memory": memory}


def about(args: argparse.Namespace) -> dict[str, Any]:
    """The machine, with the GPU's name where one is measured."""
    words = machine("torch", "triton") | {"threads": torch.get_num_threads()}
    if args.device == "cuda":
        words["processor"] = torch.cuda.get_device_name()
    return words


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--arch", default="vit_s")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--local-crops-number", type=int, default=10)
    parser.add_argument("--out-dim", type=int, default=8192)
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--checkpoint-blocks", action="store_true", help="ours: less memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="on a CPU (0: torch's choice)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--no-ablation", action="store_true", help="leave out the last table")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    return args


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        with without(args.memory_of):
            print(peak_memory(make_side(args.memory_of, args), make_batch(args)))
        return
    console = Console(width=110)
    results: dict[str, Any] = {"machine": about(args), "settings": {**vars(args), "json": None}}
    results["comparison"] = compare(args, console)
    if not args.no_ablation:
        results["ablation"] = ablate(args, console, results["comparison"]["memory"]["ours"])
    console.print(
        f"{in_words(results['machine'])}; medians (quartiles) of {args.rounds} rounds, taken in"
        " turns"
    )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, default=str))


if __name__ == "__main__":
    main()
