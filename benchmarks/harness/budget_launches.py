"""Every kernel launch of one training step as it would run on CUDA, counted without a GPU.

The step runs on fake tensors, which have shapes and dtypes but no memory. A dispatch mode sees each
operator below autograd and autocast, and `model.kernels.launch` reports the Triton kernels. How
many kernels an operator launches, and the bytes they move, follow from the rules below. They were
read off a profile of an H100 (see `tests/benchmarks/test_budget.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from ibeton.model import ModelConfig, build
from ibeton.model.backbones.blocks import Kept, Shapes, spread_kept
from ibeton.model.kernels.launch import Launch, counting
from ibeton.model.kernels.packed_attention import attention_flops
from ibeton.model.masking import BUCKETS
from ibeton.model.optim import build_optimizer
from ibeton.model.steps import Step, StepInputs

MASKED_SHARE = 0.15  # mean share of masked patches in the published recipe
SPLIT_K = 8  # a product whose inner dimension is so many times the outer ones runs in two kernels

PRODUCTS, ATTENTION, COPIES, ELEMENTWISE = "products", "attention", "copies", "element-wise"
NORM, NORM_BACKWARD, GELU, GELU_BACKWARD = "norm", "norm backward", "GELU", "GELU backward"
CONCATENATION, SUMS, OPTIMIZER = "concatenation", "sums", "optimizer and EMA"
# Triton kernels of ours: those with a reduction along the row, and those that only stream
ROW_KERNELS, STREAM_KERNELS = "row kernels", "stream kernels"
CATEGORIES = (
    *(PRODUCTS, ATTENTION, COPIES, ELEMENTWISE, NORM, NORM_BACKWARD, GELU, GELU_BACKWARD),
    *(CONCATENATION, SUMS, OPTIMIZER, ROW_KERNELS, STREAM_KERNELS),
)
# operator -> category; all that is not named here is element-wise
OPERATORS = {
    **dict.fromkeys(("mm", "addmm", "bmm"), PRODUCTS),
    **dict.fromkeys(("_to_copy", "copy_", "clone"), COPIES),
    **dict.fromkeys(("cat", "stack"), CONCATENATION),
    **dict.fromkeys(("sum", "mean", "linalg_vector_norm"), SUMS),
    "native_layer_norm": NORM,
    "native_layer_norm_backward": NORM_BACKWARD,
    "gelu": GELU,
    "gelu_backward": GELU_BACKWARD,
}
# Kernels of an operator that launches more than one
KERNELS = {
    "native_layer_norm_backward": 2,  # of the input; of gamma and beta
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,  # cuDNN's, on CUDA
}
# Triton kernels of ours; all that is not named here streams
KERNEL_CATEGORIES = {
    **dict.fromkeys(("_residual_norm_kernel", "_residual_norm_backward_kernel"), ROW_KERNELS),
    **dict.fromkeys(("_row_kernel", "_class_metrics_kernel"), ROW_KERNELS),
    **dict.fromkeys(("_attention_kernel", "_attention_backward_kernel"), ATTENTION),
}
NOT_LAUNCHED = (
    *("empty", "empty_like", "new_empty", "detach", "alias", "device", "promote_types"),
    *("_unsafe_view", "scalar_tensor", "squeeze_", "new_empty_strided"),
)
GATHERS = ("index_select", "index", "embedding")
MULTI_TENSOR = ("_foreach", "_fused", "_amp")
CHUNK = 320 * 65_536  # elements that one launch of a multi-tensor kernel takes


class Launches(NamedTuple):
    """What one operator or Triton kernel launches."""

    category: str
    name: str
    kernels: int
    bytes: int  # read and written
    flops: int  # of matrix products, two per multiply-add


class Recorder(TorchDispatchMode):
    """Notes the launches of each operator that runs in it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launches] = []
        self.kernels: list[Launch] = []  # those of Triton

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        inputs = {k: v for k, v in (kwargs or {}).items() if k != "out"}
        tensors = [t for t in tree_leaves((args, inputs)) if isinstance(t, Tensor)]
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if name.startswith(MULTI_TENSOR) and name != "_foreach_norm":
            written = tensors  # updated in place
        if name == "copy_":
            tensors = tensors[1:]
        elif name in GATHERS:  # of the first tensor, only what is taken
            tensors = [*tensors[1:], *written]
        elif name == "index_add_":
            tensors, written = tensors[1:], [tensors[-1]] * 2
        is_view = any(a.alias_info and not a.alias_info.is_write for a in func._schema.arguments)
        if not is_view and name not in NOT_LAUNCHED and any(t.numel() for t in written):
            self.note(name, tensors, written)
        return out

    def note(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        category = OPERATORS.get(name, ELEMENTWISE)
        kernels, flops = KERNELS.get(name, 1), 0
        if name.startswith(MULTI_TENSOR):
            category = OPTIMIZER
            kernels = max(1, -(-sum(t.numel() for t in read) // CHUNK))
        elif category == PRODUCTS:
            a, b = read[-2:]
            (rows, inner), columns = a.shape[-2:], b.shape[-1]
            flops = 2 * a.numel() * columns
            kernels += inner > SPLIT_K * min(rows, columns)
        elif "attention" in name:
            category = ATTENTION
            flops = _attention_flops(name, read)
        self.add(category, name, kernels, _bytes(read) + _bytes(written), flops)

    def kernel(self, launch: Launch) -> None:
        """A Triton kernel of ours, which reads or writes each tensor once."""
        # Aliases: autograd copies a gradient that somebody else holds.
        arguments = (a.detach() if isinstance(a, Tensor) else a for a in launch.arguments)
        self.kernels.append(launch._replace(arguments=tuple(arguments)))
        category = KERNEL_CATEGORIES.get(launch.name, STREAM_KERNELS)
        category = OPTIMIZER if launch.touches else category
        flops = attention_flops(launch)
        self.add(category, launch.name, 1, _bytes(launch.tensors()), flops)

    def add(self, category: str, name: str, kernels: int, moved: int, flops: int) -> None:
        self.launches.append(Launches(category, name, kernels, moved, flops))


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _attention_flops(name: str, read: list[Tensor]) -> int:
    shapes = [t.shape for t in read]
    if name.endswith("backward"):
        return sdpa_backward_flop_count(*shapes[:4])
    return sdpa_flop_count(*shapes[:3])


class Settings(NamedTuple):
    """The step that is counted, on a GPU of sm_`capability`. `kernels` False: without the Triton
    kernels of the blocks."""

    model: ModelConfig
    images: int
    local_size: int = 96
    dtype: torch.dtype | None = torch.float16
    kernels: bool = True
    capability: int = 90


def step_launches(settings: Settings) -> list[Launches]:
    """The launches of one training step, in order."""
    return record_step(settings).launches


def record_step(settings: Settings) -> Recorder:
    """What `step_launches` sees, with the launches of Triton kernels as they are made."""
    recorder, model = Recorder(), settings.model
    with _fake_gpu(settings, recorder):
        ibot = build(model)
        optimizer = build_optimizer(ibot.student)
        for group in optimizer.param_groups:  # a step in the middle of training
            for parameter in group["params"]:
                state = {name: torch.empty_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.empty(()), **state}
        size, grid = model.image_size, model.image_size // model.patch_size
        views, images, local = model.global_crops_number, settings.images, settings.local_size
        masked = views * images * grid * grid
        unit = -(-masked // BUCKETS)
        rows = -(-int(MASKED_SHARE * masked) // unit) * unit
        inputs = StepInputs(
            torch.empty(views, images, 3, size, size),
            torch.empty(model.local_crops_number, images, 3, local, local),
            torch.zeros(views, images, grid, grid, dtype=torch.bool),
            torch.empty(1, rows, dtype=torch.int64),
            torch.empty(1, rows, dtype=torch.float64),
            torch.empty(5, dtype=torch.float64),
        )
        on_host = SimpleNamespace(is_cuda=False, tolist=lambda: [1e-3, 0.1, 0.99, 0.07, 0.07])
        ibot.loss._across_views(views * images, torch.device("cpu"))  # kept from the first step on
        if settings.kernels and settings.dtype is not None:
            ibot.half_weights._make(settings.dtype)  # as the step before has left them
        scaler = torch.amp.GradScaler("cpu") if settings.dtype is torch.float16 else None
        step = Step(ibot, optimizer, scaler, autocast_dtype=settings.dtype)
        with recorder:
            gradients = step.compute_gradients(inputs, epoch=1)
            if not settings.kernels:
                inputs = inputs._replace(rates=cast(Tensor, on_host))
            step.update_weights(inputs, 1, gradients)
    return recorder


@contextmanager
def _fake_gpu(settings: Settings, recorder: Recorder) -> Iterator[None]:
    """Fake tensors that stand for those of a GPU. (They are on the CPU, as PyTorch cannot run a
    backward on fake CUDA tensors where there is no GPU.) What the host draws is given: stochastic
    depth keeps all samples."""

    def kept(rates: list[float], shapes: Shapes, *_: object) -> list[Kept | None]:
        return spread_kept(torch.empty(len(rates), sum(n for n, _ in shapes)), rates, shapes)

    def rows(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        loss, difference = torch.empty(len(student)), torch.empty_like(student)
        moved = _bytes([student, arguments[0], difference])
        recorder.add(ROW_KERNELS, "_row_kernel", 1, moved, 0)
        return loss, difference

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch("ibeton.model.backbones.vit.draw_kept", kept),
        mock.patch("ibeton.model.kernels.head.cross_entropy.rows_by_chunk", rows),
        counting(recorder.kernel, settings.capability) if settings.kernels else nullcontext(),
    ):
        yield
