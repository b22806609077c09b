"""Each kernel of the model, forward and backward, against its plain PyTorch reference and against
the time in which a copy moves the bytes that it must move.

`python benchmarks/kernels.py` runs Triton on CUDA where there is a device, else the CPU's path. The
two sides take turns on the same tensors. "of copy" is the speed of a large copy, measured in the
same rounds, as the limit: 100 % would be a kernel that does nothing but move its bytes. Linear
layers and attention are bound by their products instead; their reference is PyTorch's. Of those
that recompute norm or GELU the bytes count that they keep for the backward: the last column.

    TRITON_INTERPRET=1 python benchmarks/kernels.py --device cpu --rounds 1

runs all kernels in Triton's interpreter, at the smallest sizes: it shows that this file works, its
times mean nothing.

With --compile nothing is timed: it compiles all kernels of a training step for sm_70, sm_80 and
sm_90, without a GPU, and lists their registers, shared memory and spills.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from ibeton.benchmarks.harness import measure as harness
from ibeton.benchmarks.harness.budget_launches import Settings, record_step
from ibeton.benchmarks.harness.compiled_kernels import compile_launch, distinct
from ibeton.benchmarks.harness.interpreter import adapt_interpreter
from ibeton.benchmarks.harness.measure import figures, ratios, spread
from ibeton.benchmarks.harness.model_step import new_step, now, on_gpu
from ibeton.command import run_or_exit
from ibeton.distributed import make_current
from ibeton.model import ModelConfig
from ibeton.model.config import ARCHITECTURES
from ibeton.model.cuda_graph import CudaRecorder
from ibeton.model.fused.embed import fused_embed
from ibeton.model.fused.head import fused_prototypes
from ibeton.model.host_inputs import HostInputs
from ibeton.model.kernels.bias_gelu import bias_gelu, bias_gelu_reference
from ibeton.model.kernels.column_sums import partial_sums
from ibeton.model.kernels.embed_tokens import Added, embed_tokens_reference
from ibeton.model.kernels.head.cross_entropy import cross_entropy, cross_entropy_reference
from ibeton.model.kernels.head.weight_norm import weight_norm_reference
from ibeton.model.kernels.launch import interpreted
from ibeton.model.kernels.library_attention import split_heads
from ibeton.model.kernels.packed_attention import Shapes, attend, attention_backward
from ibeton.model.kernels.recomputing import gelu_linear, norm_linear
from ibeton.model.kernels.residual_norm import Branch, residual_norm, residual_norm_reference
from ibeton.model.steps import StepInputs
from ibeton.progress import plain_console
from ibeton.training.precision import DTYPES


class Sizes(NamedTuple):
    """Sizes of a step of 2 + 10 views; by default of ViT-S/16."""

    images: int
    patches: tuple[int, int] = (196, 36)  # of a global and a local view
    width: int = 384  # channels
    hidden: int = 2048  # of the head, as the two below
    bottleneck: int = 256
    prototypes: int = 8192
    many_prototypes: int = 65_536  # a row takes two sweeps

    def shapes(self) -> Shapes:
        return [(2 * self.images, self.patches[0] + 1), (10 * self.images, self.patches[1] + 1)]

    def tokens(self) -> int:
        return sum(images * tokens for images, tokens in self.shapes())

    def heads(self) -> int:
        return max(1, self.width // 64)

    def masked(self) -> int:
        """Masked patches, at their mean share."""
        return max(1, 2 * self.images * self.patches[0] * 15 // 100)


SMALLEST = Sizes(1, (4, 1), 32, 32, 16, 64, 16_384)


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


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, shapes: Shapes, heads: int) -> Tensor:
        ctx.attended = attend(qkv, shapes, heads, with_grad=True)
        return ctx.attended.out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        partial = partial_sums(grad, 3 * grad.shape[1])
        return attention_backward(grad.contiguous(), ctx.attended, partial), None, None


def library_attention(qkv: Tensor, shapes: Shapes, heads: int) -> Tensor:
    outs = []
    for part, (images, tokens) in zip(qkv.split([n * t for n, t in shapes]), shapes, strict=True):
        query, key, value = split_heads(part, images, tokens, heads)
        out = F.scaled_dot_product_attention(query, key, value)
        outs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
    return torch.cat(outs)


def loss_cases(sizes: Sizes, x: Any) -> list[Case]:
    images, masked = sizes.images, sizes.masked()
    few = max(1, masked // 8)
    return [
        loss_case("class loss", 12 * images, 2 * images, sizes.prototypes, 2, x),
        loss_case("patch loss", masked, masked, sizes.prototypes, 1, x),
        loss_case("patch loss", few, few, sizes.many_prototypes, 1, x),
    ]


def update_case(sizes: Sizes, x: Any) -> Case:
    """Clipping, AdamW, the teacher's average and copies of a network of two blocks."""
    config = ModelConfig(
        embed_dim=sizes.width,
        depth=2,
        num_heads=sizes.heads(),
        out_dim=sizes.prototypes,
        hidden_dim=sizes.hidden,
        bottleneck_dim=sizes.bottleneck,
    )
    step = new_step(config, x["device"], None)
    ibot = step.ibot
    if x["dtype"] is not torch.float32:
        ibot.half_weights._make(x["dtype"])
    for parameter in ibot.student.parameters():
        parameter.grad = torch.ones_like(parameter)
    rates = torch.full((5,), 1e-6, dtype=torch.float64, device=x["device"])
    inputs = StepInputs(*[rates] * 6)

    def fused(leaf: Tensor) -> Tensor:
        return leaf + step._update(rates, None, frozen=False)[0]

    def plain(leaf: Tensor) -> Tensor:
        return leaf + step._update_plainly(inputs, epoch=1)[0]

    values = sum(p.numel() for p in ibot.student.parameters())
    # Gradients read twice; weights, moments and teacher read and written; both copies written.
    copies = 2 * x["dtype"].itemsize if x["dtype"] is not torch.float32 else 0
    return Case("update", fused, plain, torch.zeros((), device=x["device"]), (40 + copies) * values)


def fused_cases(sizes: Sizes, x: Any) -> list[Case]:
    """The Triton kernels of a step. The stream is float32 in any precision."""
    device, dtype = x["device"], x["dtype"]
    images, width, grid = sizes.images, sizes.width, sizes.patches[0]
    shapes, tokens, heads = sizes.shapes(), sizes.tokens(), sizes.heads()
    stream = torch.randn(tokens, width, device=device)
    out, hidden = torch.randn(tokens, width, **x), torch.randn(tokens, 4 * width, **x)
    gamma, beta, bias = torch.randn(3, width, device=device).unbind()
    hidden_bias = torch.randn(4 * width, device=device)
    qkv, branch = torch.randn(tokens, 3 * width, **x), Branch(out, bias)
    patches = torch.randn(2 * images, 1, grid, 3, 16, 16, device=device)
    weight = torch.randn(width, 3, 16, 16, device=device, requires_grad=True)
    table = torch.randn(1, 1 + grid, width, device=device, requires_grad=True)
    cls = torch.randn(1, 1, width, device=device, requires_grad=True)
    units = torch.randn(16, sizes.bottleneck, **x)
    direction = torch.randn(sizes.prototypes, sizes.bottleneck, device=device)
    length = torch.ones(sizes.prototypes, 1, device=device)
    small, wide = out.numel() * out.element_size(), hidden.numel() * hidden.element_size()
    embedded = 2 * images * (1 + grid) * width * (8 + 2 * out.element_size())

    def embed(t: Tensor) -> Tensor:
        return fused_embed([patches], [None], [table], weight, t, cls, None)[0]

    def embed_reference(t: Tensor) -> Tensor:
        product = patches.flatten(3).flatten(0, 2).to(dtype) @ weight.to(dtype).flatten(1).t()
        return embed_tokens_reference(product, None, Added(t, cls, table))

    def prototypes(t: Tensor) -> Tensor:
        return fused_prototypes([units], t, length)[0]

    def prototypes_reference(t: Tensor) -> Tensor:
        return units @ weight_norm_reference(t, length).to(dtype).t()

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
        Case(
            f"attention, bound by its products [{tokens}, {width}]",
            lambda t: Attention.apply(t, shapes, heads),
            lambda t: library_attention(t, shapes, heads),
            qkv,
            12 * small,
        ),
        Case("embedding with its linear layer", embed, embed_reference, bias, embedded),
        Case("prototypes, a linear layer", prototypes, prototypes_reference, direction, 0),
        update_case(sizes, x),
    ]


def linear_cases(sizes: Sizes, x: Any) -> list[Case]:
    tokens, width = sizes.tokens(), sizes.width
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
            lambda t: up(norm(t)),
            small,
            moved,
        ),
        Case(
            f"recomputed GELU + linear [{tokens}, {4 * width}]",
            lambda t: gelu_linear(t, down),
            lambda t: down(F.gelu(t)),
            large,
            moved_down,
        ),
    ]


def seconds(function: Callable[[], object], device: str) -> float:
    start = now(device)
    function()
    return now(device) - start


def prepared(function: Callable[[], object], device: str) -> Callable[[], float]:
    """What runs it and returns the seconds that it took. On CUDA it becomes a CUDA graph, so that
    the host does not slow it down."""
    if not on_gpu(device):
        return partial(seconds, function, device)
    recorder, draws = CudaRecorder(), HostInputs()
    with recorder.warm_up(), draws.recording():
        function()
    return partial(seconds, recorder.record(function, draws), device)


def forward_and_backward(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    leaf = x.detach().requires_grad_()
    out = function(leaf)
    out.backward(torch.ones_like(out))


def kept_bytes(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    with harness.counting_kept() as kept:
        function(x.detach().requires_grad_())
        return kept()


def measure(case: Case, rounds: int, device: str) -> dict[str, Any]:
    source = torch.empty(max(case.bytes // 2, 1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    sides = {"fused": case.fused, "reference": case.reference}
    steps = {
        name: prepared(partial(forward_and_backward, side, case.x), device)
        for name, side in sides.items()
    }
    steps["copy"] = partial(seconds, lambda: target.copy_(source), device)
    times = harness.in_turns(steps, rounds)
    times["copy"] = [took / (2 * source.numel()) for took in times["copy"]]  # of a byte
    kept = {name: kept_bytes(side, case.x) for name, side in sides.items()}
    return {"seconds": times, "bytes": case.bytes, "kept": kept}


def show_resources(arch: str, dtype: torch.dtype | None, console: Console) -> None:
    """What every kernel of a step takes, compiled for three architectures."""
    title = f"kernels of {arch}: registers per thread / bytes of shared memory / spills"
    table = figures("kernel", "width", "warps", "sm_70", "sm_80", "sm_90", title=title)
    rows: dict[tuple[str, str, str], list[str]] = {}
    for i, capability in enumerate((70, 80, 90)):
        settings = Settings(ModelConfig(arch=arch, depth=2), 4, dtype=dtype, capability=capability)
        for launch in distinct(record_step(settings).kernels):
            made = compile_launch(launch, capability)
            width = launch.constants.get("WIDTH", launch.constants.get("PROTOTYPES", ""))
            row = rows.setdefault((launch.name, str(width), str(made.warps)), [""] * 3)
            row[i] = f"{made.registers} / {made.shared} / {made.spills}"
    for names, cells in rows.items():
        table.add_row(*names, *cells)
    console.print(table)


def main() -> None:
    parser, images = harness.make_parser(__doc__, rounds=9, least=1), harness.integer(1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--images", type=images, default=8, help="of 2 + 10 views of ViT-S/16")
    parser.add_argument(
        "--compile", choices=tuple(ARCHITECTURES), help="list what its kernels take, and end"
    )
    args = parser.parse_args()
    console, dtype = plain_console(width=110), DTYPES[args.precision]
    if args.compile:
        show_resources(args.compile, dtype, console)
        return
    make_current(torch.device(args.device))
    x = {"device": args.device, "dtype": dtype or torch.float32}
    sizes = Sizes(args.images)
    if interpreted():
        adapt_interpreter()
        sizes = SMALLEST
    cases = loss_cases(sizes, x) + linear_cases(sizes, x)
    if on_gpu(args.device) or interpreted():
        cases += fused_cases(sizes, x)
    headings = ("fused", "reference", "reference / fused", "of copy", "kept")
    title = f"forward and backward, ms, {args.precision} on {args.device}"
    table = figures("kernel", *headings, title=title)
    results: dict[str, Any] = {}
    for case in cases:
        results[case.name] = result = measure(case, args.rounds, args.device)
        times, kept = result["seconds"], result["kept"]
        table.add_row(
            case.name,
            *(spread([1e3 * t for t in times[side]]) for side in ("fused", "reference")),
            spread(ratios(times, "reference", "fused")),
            spread([100 * case.bytes * share for share in ratios(times, "copy", "fused")]) + " %",
            f"{kept['fused'] / kept['reference']:.2f}" if kept["reference"] else "",
        )
    console.print(table)
    if interpreted():
        console.print("by Triton's interpreter: these times say nothing about a GPU")
    about = harness.machine("torch", "triton", device=args.device)
    about["threads"] = torch.get_num_threads()
    harness.conclude(console, about, args.rounds, args.json, kernels=results)


if __name__ == "__main__":
    run_or_exit(main)
