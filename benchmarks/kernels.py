"""Each kernel of the model, forward and backward, against its plain PyTorch reference and against
the time in which a copy moves the bytes that it must move.

`python benchmarks/kernels.py` runs Triton on CUDA where there is a device, else the CPU's path. The
two sides take turns on the same tensors. "of copy" is the speed of a large copy, measured in the
same rounds, as the limit: 100 % would be a kernel that does nothing but move its bytes. The linear
layers that recompute norm or GELU are bound by their matrix product instead: for them what counts
is the bytes that they keep for the backward, which the last column gives against the reference.

With --compile nothing is timed: it compiles all kernels of a training step for sm_70, sm_80 and
sm_90, without a GPU, and lists their registers, shared memory and spills.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ibeton.benchmarks.harness.budget_launches import Settings, record_step
from ibeton.benchmarks.harness.compiled_kernels import compile_launch, distinct
from ibeton.benchmarks.harness.measure import in_words, machine, spread
from ibeton.command import run_or_exit
from ibeton.model import ModelConfig
from ibeton.model.config import ARCHITECTURES
from ibeton.model.kernels.bias_gelu import bias_gelu, bias_gelu_reference
from ibeton.model.kernels.cross_entropy import cross_entropy, cross_entropy_reference
from ibeton.model.kernels.gelu_linear import gelu_linear, gelu_linear_reference
from ibeton.model.kernels.norm_linear import norm_linear, norm_linear_reference
from ibeton.model.kernels.residual_norm import Branch, residual_norm, residual_norm_reference
from ibeton.progress import plain_console

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    name: str
    fused: Callable[[Tensor], Tensor]
    reference: Callable[[Tensor], Tensor]
    x: Tensor  # what gets a gradient
    bytes: int  # that forward and backward must move


def loss_case(name: str, rows: int, teachers: int, prototypes: int, targets: int, x: Any) -> Case:
    student = torch.randn(rows, prototypes, **x)
    teacher = torch.randn(teachers, prototypes, **x)
    center = torch.zeros(prototypes, device=x["device"])
    pairs = torch.arange(rows * targets, device=x["device"]).view(rows, targets) % teachers
    weight = torch.full((rows,), 1 / rows, device=x["device"])
    rest = (teacher, center, pairs, weight, 0.1, 0.07)
    # Read student and teacher, write the gradient; the backward reads and writes it once more.
    moved = (4 * student.numel() + teacher.numel()) * student.element_size()
    return Case(
        f"{name} [{rows}, {prototypes}]",
        lambda s: cross_entropy(s, *rest),
        lambda s: cross_entropy_reference(s, *rest),
        student,
        moved,
    )


def fused_cases(tokens: int, width: int, x: Any) -> list[Case]:
    """The kernels of a block, on CUDA alone. The stream is float32 in any precision."""
    stream = torch.randn(tokens, width, device=x["device"])
    out, hidden = torch.randn(tokens, width, **x), torch.randn(tokens, 4 * width, **x)
    gamma, beta, bias = torch.randn(3, width, device=x["device"]).unbind()
    hidden_bias = torch.randn(4 * width, device=x["device"])
    branch, dtype = Branch(out, bias), x["dtype"]
    small, wide = out.numel() * out.element_size(), hidden.numel() * hidden.element_size()
    return [
        Case(
            f"residual + norm [{tokens}, {width}]",
            lambda t: residual_norm(t, branch, gamma, beta, 1e-6, dtype)[1],
            lambda t: residual_norm_reference(t, branch, gamma, beta, 1e-6, dtype)[1],
            stream,
            # Forward: stream read and written, branch read, norm written. Backward: gradient and
            # stream read, gradients of stream and branch written.
            4 * 4 * stream.numel() + 4 * small,
        ),
        Case(
            f"bias + GELU [{tokens}, {4 * width}]",
            lambda t: bias_gelu(t, hidden_bias),
            lambda t: bias_gelu_reference(t, hidden_bias),
            hidden,
            5 * wide,
        ),
    ]


def linear_cases(tokens: int, width: int, x: Any) -> list[Case]:
    norm = nn.LayerNorm(width).to(**x)
    up, down = nn.Linear(width, 4 * width).to(**x), nn.Linear(4 * width, width).to(**x)
    small, large = torch.randn(tokens, width, **x), torch.randn(tokens, 4 * width, **x)
    # Forward reads the input and writes the output; backward reads both and writes a gradient.
    moved = (3 * small.numel() + 2 * large.numel()) * small.element_size()
    moved_down = (3 * large.numel() + 2 * small.numel()) * small.element_size()
    return [
        Case(
            f"recomputed norm + linear [{tokens}, {width}]",
            lambda t: norm_linear(t, norm, up),
            lambda t: norm_linear_reference(t, norm, up),
            small,
            moved,
        ),
        Case(
            f"recomputed GELU + linear [{tokens}, {4 * width}]",
            lambda t: gelu_linear(t, down),
            lambda t: gelu_linear_reference(t, down),
            large,
            moved_down,
        ),
    ]


def seconds(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def forward_and_backward(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    leaf = x.detach().requires_grad_()
    out = function(leaf)
    out.backward(torch.ones_like(out))


def kept_bytes(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes that wait for the backward, parameters included, each tensor once."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(x.detach().requires_grad_())
    return sum(sizes.values())


def measure(case: Case, rounds: int, device: str) -> dict[str, Any]:
    source = torch.empty(max(case.bytes // 2, 1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times: dict[str, list[float]] = {"fused": [], "reference": [], "copy": []}
    for i in range(rounds + 1):
        took = {
            "fused": seconds(lambda: forward_and_backward(case.fused, case.x), device),
            "reference": seconds(lambda: forward_and_backward(case.reference, case.x), device),
            "copy": seconds(lambda: target.copy_(source), device) / (2 * source.numel()),
        }
        if i:
            for name, value in took.items():
                times[name].append(value)
    kept = {
        "fused": kept_bytes(case.fused, case.x),
        "reference": kept_bytes(case.reference, case.x),
    }
    return {"seconds": times, "bytes": case.bytes, "kept": kept}


def show_resources(arch: str, dtype: torch.dtype | None, console: Console) -> None:
    """What every kernel of a step takes, compiled for three architectures."""
    table = Table(
        title=f"kernels of {arch}: registers per thread / bytes of shared memory / spills"
    )
    for heading in ("kernel", "width", "warps", "sm_70", "sm_80", "sm_90"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    settings = Settings(ModelConfig(arch=arch, depth=2), 4, dtype=dtype)
    for launch in distinct(record_step(settings).kernels):
        made = [compile_launch(launch, capability) for capability in (70, 80, 90)]
        width = launch.constants.get("WIDTH", launch.constants.get("PROTOTYPES", ""))
        cells = [f"{m.registers} / {m.shared} / {m.spills}" for m in made]
        table.add_row(launch.name, str(width), str(made[0].warps), *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--images", type=int, default=8, help="of 2 + 10 views of ViT-S/16")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each side")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--compile", choices=tuple(ARCHITECTURES), help="list what its kernels take, and end"
    )
    args = parser.parse_args()
    console = plain_console(width=110)
    if args.compile:
        half = args.precision != "fp32"
        show_resources(args.compile, DTYPES[args.precision] if half else None, console)
        return
    x = {"device": args.device, "dtype": DTYPES[args.precision]}
    masked = args.images * 2 * 196 * 15 // 100  # the mean share of masked patches
    cases = [
        loss_case("class loss", 12 * args.images, 2 * args.images, 8192, 2, x),
        loss_case("patch loss", masked, masked, 8192, 1, x),
        loss_case("patch loss", max(1, masked // 8), max(1, masked // 8), 65_536, 1, x),
        *linear_cases(args.images * (2 * 197 + 10 * 37), 384, x),
    ]
    if args.device == "cuda":
        cases += fused_cases(args.images * (2 * 197 + 10 * 37), 384, x)
    table = Table(title=f"forward and backward, ms, {args.precision} on {args.device}")
    for heading in ("kernel", "fused", "reference", "reference / fused", "of copy", "kept"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    results: dict[str, Any] = {}
    for case in cases:
        results[case.name] = result = measure(case, args.rounds, args.device)
        fused, plain, copy = result["seconds"].values()
        table.add_row(
            case.name,
            spread([1e3 * t for t in fused]),
            spread([1e3 * t for t in plain]),
            spread([b / a for a, b in zip(fused, plain, strict=True)]),
            spread([100 * c * case.bytes / a for a, c in zip(fused, copy, strict=True)]) + " %",
            f"{result['kept']['fused'] / result['kept']['reference']:.2f}",
        )
    console.print(table)
    about = machine("torch", "triton")
    if args.device == "cuda":
        about["processor"] = torch.cuda.get_device_name()
    console.print(
        f"{in_words(about)}, {torch.get_num_threads()} threads; medians (quartiles) of"
        f" {args.rounds} rounds, the sides in turns"
    )
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "kernels": results}, indent=1))


if __name__ == "__main__":
    run_or_exit(main)
