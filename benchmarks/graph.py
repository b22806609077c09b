"""A whole training step of the model: plain, eager, and as a CUDA graph.

    python benchmarks/graph.py                  # the cases below, most important first
    python benchmarks/graph.py --cases vit_s:fp16:64 small:fp16:256 --seconds 60

Of each case and side: images/s, the share of the rate of a large matrix product, what the host
needs to enqueue a step, launches, and peak memory. "plain" is
`model.reference`; "eager" is `training_step`; "graph" is `GraphedStep`. On a CPU "graph" runs the
same code without a graph: that shows that it runs, not how fast it is.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console

from ibeton.benchmarks.harness.measure import figures, in_words, machine, make_parser
from ibeton.benchmarks.harness.model_step import Baseline, Batch, new_step, now, on_gpu
from ibeton.command import run_or_exit
from ibeton.distributed import make_current
from ibeton.model import ModelConfig, training_step
from ibeton.model.config import ARCHITECTURES
from ibeton.model.cuda_graph import GraphedStep
from ibeton.progress import plain_console
from ibeton.training.precision import DTYPES
from ibeton.training.timing.flops import flop_counter, matrix_rate

CASES = (
    *("vit_s:fp16:64", "small:fp16:256", "vit_s:fp16:256", "vit_s:fp16:8", "vit_s:bf16:64"),
    *("vit_b:fp16:64", "vit_b:bf16:64", "vit_b:fp16:8", "vit_s:bf16:256", "vit_s:bf16:8"),
    *("vit_b:bf16:8", "vit_b:fp16:256", "vit_b:bf16:256"),
)
PLAIN_CASES = ("vit_s:fp16:64", "small:fp16:256")  # where the plain model is timed too
RATES = {"epoch": 1, "lr": 1e-4, "weight_decay": 0.04, "momentum": 0.996}
TIMED_S = 1.5  # seconds of timed steps
LAUNCHES = (
    *("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"),
    *("cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync"),
)


class Case(NamedTuple):
    """One step: a model, a precision, and a batch."""

    name: str
    config: ModelConfig
    precision: str
    images: int
    local_size: int

    def batch(self, device: str) -> Batch:
        return Batch(self.config, self.images, self.local_size, device)


def case_of(name: str) -> Case:
    """ "vit_s:fp16:64" -> the case. "small" is a ViT of 192 x 9 on 2 x 32 + 4 x 16 pixels, "tiny"
    a still smaller one, for rehearsals. Raises ValueError for a name of another form."""
    arch, _, rest = name.partition(":")
    precision, _, count = rest.partition(":")
    archs = (*ARCHITECTURES, "small", "tiny")
    if arch not in archs or not count.isdecimal():
        raise ValueError(
            f"{name}: expected MODEL:PRECISION:IMAGES, such as vit_s:fp16:64, with a model of"
            f" {', '.join(archs)}"
        )
    if precision not in DTYPES:
        raise ValueError(f"{name}: expected a precision of {', '.join(DTYPES)}")
    images = int(count)
    if images < 1:
        raise ValueError(f"{name}: expected at least 1 image")
    if arch in ARCHITECTURES:
        return Case(name, ModelConfig(arch=arch), precision, images, 96)
    sizes = {"embed_dim": 192, "depth": 9, "num_heads": 3, "out_dim": 8192}
    if arch == "tiny":
        sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "out_dim": 64, "hidden_dim": 32}
    small: dict[str, Any] = {"arch": "vit_t", "patch_size": 4, "image_size": 32, **sizes}
    config = ModelConfig(**small, local_crops_number=4)
    return Case(name, config, precision, images, 16)


def step_of(side: str, case: Case, device: str) -> Callable[[], object]:
    """A function that takes a step, and does not wait for the device."""
    batch, dtype = case.batch(device), DTYPES[case.precision]
    if side == "plain":
        baseline = Baseline(case.config, device, dtype)
        return lambda: baseline.step(batch)
    step = new_step(case.config, device, dtype)
    inputs = (batch.global_crops, batch.local_crops, batch.masks)
    if side == "graph":
        graphed = GraphedStep(step, required=True)
        return lambda: graphed(*inputs, **RATES)  # type: ignore[arg-type]
    parts = (step.ibot, step.optimizer, step.scaler)
    return lambda: training_step(*parts, *inputs, autocast_dtype=dtype, **RATES)  # type: ignore[arg-type]


def measure(side: str, case: Case, device: str) -> dict[str, float]:
    """Seconds per step, host seconds, launches (0: not counted), and peak bytes."""
    step = step_of(side, case, device)
    for _ in range(3):  # compile, capture, replay
        step()
    first = timed(step, 1, device)
    seconds = timed(step, max(1, min(50, int(TIMED_S / first))), device)
    hosts = []
    for _ in range(5 if on_gpu(device) else 1):  # with an empty queue, which never makes it wait
        start = now(device)
        step()
        hosts.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() if on_gpu(device) else 0
    result = {"seconds": seconds, "host": statistics.median(hosts), "memory": memory}
    return result | {"launches": launches(step, device)}


def timed(step: Callable[[], object], count: int, device: str) -> float:
    """Seconds per step over `count` steps."""
    start = now(device)
    for _ in range(count):
        step()
    return (now(device) - start) / count


def launches(step: Callable[[], object], device: str) -> int:
    """What the host launches in a step: kernels, graphs, copies. 0 on a CPU."""
    if not on_gpu(device):
        return 0
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as trace:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in trace.key_averages() if event.key in LAUNCHES)


def compare(case: Case, device: str, sides: tuple[str, ...]) -> dict[str, Any]:
    """All sides of a case; a side that runs out of memory is left out, with the reason."""
    results: dict[str, Any] = {"images": case.images}
    free_memory(device)
    try:
        with flop_counter() as counter:
            step_of("eager", case, device)()
        results["flops"] = float(counter.get_total_flops())
        results["peak_flops"] = matrix_rate(torch.device(device), DTYPES[case.precision])
    except torch.OutOfMemoryError as error:
        return results | dict.fromkeys(sides, out_of_memory(error))
    for side in sides:
        free_memory(device)
        try:
            results[side] = measure(side, case, device)
        except torch.OutOfMemoryError as error:
            results[side] = out_of_memory(error)
    return results


def free_memory(device: str) -> None:
    """Free what the last step has left."""
    gc.collect()
    if on_gpu(device):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def out_of_memory(error: torch.OutOfMemoryError) -> dict[str, str]:
    return {"problem": str(error).splitlines()[0]}


def show(name: str, case: dict[str, Any], sides: tuple[str, ...], console: Console) -> None:
    headings = ("ms", "images/s", "of peak", "host ms", "launches", "GiB")
    table = figures("case", "side", *headings, title="a training step")
    table.columns[1].justify = "left"
    for side in sides:
        found, is_plain = case[side], side == "plain"
        if "problem" in found:
            table.add_row(name, side, "out of memory")
            continue
        share = case["flops"] / found["seconds"] / case["peak_flops"]
        table.add_row(
            *(name, side, f"{1e3 * found['seconds']:.3g}"),
            f"{case['images'] / found['seconds']:,.0f}",
            "" if is_plain else f"{share:.1%}",
            "" if is_plain else f"{1e3 * found['host']:.3g}",
            f"{found['launches']:,}" if found["launches"] else "",
            f"{found['memory'] / 2**30:.2f}" if found["memory"] else "",
        )
    console.print(table)


def main() -> None:
    parser = make_parser(__doc__, rounds=0)
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="MODEL:PRECISION:IMAGES")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=600, help="cases begin within this time")
    args = parser.parse_args()
    try:
        cases = [case_of(name) for name in args.cases]
    except ValueError as error:
        parser.error(f"--cases {error}")
    make_current(torch.device(args.device))
    console, results = plain_console(width=110), {}
    about, start = machine("torch", "triton", device=args.device), time.monotonic()
    bf16 = not on_gpu(args.device) or torch.cuda.is_bf16_supported(including_emulation=False)
    for case in cases:
        if time.monotonic() - start > args.seconds:
            console.print(f"{case.name}: skipped, {args.seconds:g} s are over")
            continue
        if case.precision == "bf16" and not bf16:
            console.print(f"{case.name}: skipped, this GPU does not support bf16")
            continue
        sides = ("plain", "eager", "graph") if case.name in PLAIN_CASES else ("eager", "graph")
        results[case.name] = compare(case, args.device, sides)
        show(case.name, results[case.name], sides, console)
        if args.json:  # after each case: a process that is ended leaves what it has
            args.json.write_text(json.dumps({"machine": about, "cases": results}, indent=1))
    console.print(in_words(about))


if __name__ == "__main__":
    run_or_exit(main)
