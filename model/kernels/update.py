"""The whole update after a backward in four launches: norms of all gradients (two), whether to
skip the step, and AdamW with clipping, the teacher's moving average and the half-precision copies.

The kernels reach the tensors by a table of addresses, one row per parameter, so their number does
not grow with that of the parameters. Gradients stay scaled and unclipped: the update applies the
factors as it reads them. `model.steps` has the same update in plain PyTorch.

In shapes: P parameters, N chunks of all of them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ibeton.model.kernels.launch import counted, jit, launch, tl, triton

CHUNK, BLOCK = 8192, 1024  # values of a program, and of those that it holds at a time
ALIGNED = 16  # bytes; loads are wide where all addresses are multiples
# Columns of the table: addresses, 0 for none; the size; flags
COLUMNS = 10
LEARNS, DECAYS = 1, 2


class Slot(NamedTuple):
    """The tensors that belong to a parameter of the student; all contiguous and of its size."""

    weight: Tensor  # float32
    grad: Tensor | None = None
    exp_avg: Tensor | None = None  # None: the optimizer leaves the parameter alone
    exp_avg_sq: Tensor | None = None
    step: Tensor | None = None  # float32 []
    teacher: Tensor | None = None
    half: Tensor | None = None  # copies in the dtype of products
    teacher_half: Tensor | None = None
    decays: bool = False

    def row(self) -> list[int]:
        """Of the table."""
        learns = LEARNS * (self.grad is not None and self.exp_avg is not None)
        addresses = [0 if t is None or counted() else t.data_ptr() for t in self[:8]]
        return [*addresses, self.weight.numel(), learns + DECAYS * self.decays]


class Settings(NamedTuple):
    """What stays the same in a run."""

    beta1: float
    beta2: float
    eps: float
    clip: float  # of each gradient's norm; 0: none


def chunk_table(sizes: tuple[int, ...]) -> Tensor:
    """int32 [N, 2]: for each chunk its parameter and its number in it."""
    rows = [(i, j) for i, size in enumerate(sizes) for j in range(-(-size // CHUNK))]
    return torch.tensor(rows, dtype=torch.int32)


def fused_update(
    slots: list[Slot],
    table: Tensor,  # int64 [P, COLUMNS], the rows of the slots
    chunks: Tensor,  # int32 [N, 2], `chunk_table` of their sizes
    rates: Tensor,  # float64 [3 or more]: learning rate, weight decay, momentum
    scale: Tensor | None,  # float32 [], by which the gradients are too large
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Clip, step, and move the teacher, all in place. Returns the norm of all gradients before
    clipping, float32 [], and whether it is not finite, float32 []: then nothing has changed."""
    count, device = len(slots), table.device
    squares = torch.empty(len(chunks), dtype=torch.float32, device=device)
    norms = torch.empty(count, dtype=torch.float32, device=device)
    factors = torch.empty(3, count, dtype=torch.float32, device=device)
    found = torch.empty(2, dtype=torch.float32, device=device)
    addresses = [address for slot in slots for i, address in enumerate(slot.row()[:8]) if i != 4]
    aligned = all(address % ALIGNED == 0 for address in addresses)
    grads = [slot.grad for slot in slots if slot.grad is not None]
    constants = {"COLUMNS": COLUMNS, "CHUNK": CHUNK, "BLOCK": BLOCK, "ALIGNED": aligned}
    grid = (len(chunks),)
    launch(_squares_kernel, grid, table, chunks, squares, touches=grads, num_warps=4, **constants)
    launch(
        _norms_kernel, (count,), squares, table, chunks, norms, len(chunks),
        COLUMNS=COLUMNS, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    launch(
        _decide_kernel,
        (1,),
        *(table, norms, rates, scale, factors, found, count),
        *(math.log(settings.beta1), math.log(settings.beta2), settings.clip),
        COLUMNS=COLUMNS,
        BLOCK=triton.next_power_of_2(count),
        num_warps=4,
    )
    halves = [t for slot in slots for t in (slot.half, slot.teacher_half) if t is not None]
    inside = [t for slot in slots for t in slot[:8] if t is not None]
    written = [t for s in slots for t in (s.weight, s.exp_avg, s.exp_avg_sq, s.teacher)]
    launch(
        _update_kernel,
        grid,
        *(table, chunks, rates, factors, found, count),
        *(settings.beta2, 1 - settings.beta1, 1 - settings.beta2, settings.eps),
        touches=inside + [t for t in written if t is not None],
        HALF=halves[0].dtype is torch.float16 if halves else False,
        num_warps=4,
        **constants,
    )
    return found[0], found[1]


@jit
def _address(table, column: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    address = tl.load(table + column)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@jit
def _squares_kernel(  # type: ignore[no-untyped-def]
    table,  # int64 [P, COLUMNS]
    chunks,  # int32 [N, 2]
    squares,  # float32 [N], out
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Sum of the squares of a chunk of a gradient."""
    program = tl.program_id(0)
    row = table + tl.load(chunks + 2 * program) * COLUMNS
    first = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    address = _address(row, 1, ALIGNED)
    size = tl.where(address == 0, 0, tl.load(row + 8))
    grad = address.to(tl.pointer_type(tl.float32))
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tl.minimum(size - first, CHUNK), BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        value = tl.load(grad + at, mask=at < size, other=0.0)
        total += value * value
    tl.store(squares + program, tl.sum(total, axis=0))


@jit
def _norms_kernel(  # type: ignore[no-untyped-def]
    squares,  # float32 [N]
    table,  # int64 [P, COLUMNS]
    chunks,  # int32 [N, 2]
    norms,  # float32 [P], out
    count,  # N
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The norm of one gradient, from its chunks."""
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        owner = tl.load(chunks + 2 * at, mask=at < count, other=-1)
        total += tl.load(squares + at, mask=owner == program, other=0.0)
    tl.store(norms + program, tl.sqrt(tl.sum(total, axis=0)))


@jit
def _decide_kernel(  # type: ignore[no-untyped-def]
    table,  # int64 [P, COLUMNS]
    norms,  # float32 [P], of gradients that are still scaled
    rates,  # float64 [3]
    scale,  # float32 [] or None
    factors,  # float32 [3, P], out: of the gradient, of the step, of the second moment's root
    found,  # float32 [2], out: norm of all gradients; 1 if it is not finite
    count,  # P
    log_beta1,  # float32 near the logarithm is closer than near beta itself
    log_beta2,
    clip,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, P at least
):
    """Whether to skip the step, and the factors of each parameter."""
    i = tl.arange(0, BLOCK)
    inside = i < count
    unscale = 1.0
    if scale is not None:
        unscale = 1.0 / tl.load(scale)
    norm = tl.load(norms + i, mask=inside, other=0.0) * unscale
    total = tl.sqrt(tl.sum(norm * norm, axis=0))
    finite = total < float("inf")  # NaN is not
    tl.store(found, total)
    tl.store(found + 1, tl.where(finite, 0.0, 1.0))
    factor = unscale + tl.zeros([BLOCK], tl.float32)
    if clip > 0:
        factor *= tl.minimum(clip / (norm + 1e-6), 1.0)
    flags = tl.load(table + i * COLUMNS + 9, mask=inside, other=0)
    learns = inside & (flags % 2 == 1)
    steps = tl.load(table + i * COLUMNS + 4, mask=learns, other=0)
    steps = steps.to(tl.pointer_type(tl.float32))
    step = tl.load(steps, mask=learns, other=1.0) + tl.where(finite, 1.0, 0.0)
    tl.store(steps, step, mask=learns)
    wide = tl.maximum(step, 1.0).to(tl.float64)
    first = 1.0 - tl.exp(wide * log_beta1)
    second = 1.0 - tl.exp(wide * log_beta2)
    tl.store(factors + i, factor, mask=inside)
    tl.store(factors + count + i, (tl.load(rates) / first).to(tl.float32), mask=inside)
    root = (1.0 / tl.sqrt(second)).to(tl.float32)
    tl.store(factors + 2 * count + i, root, mask=inside)


@jit
def _update_kernel(  # type: ignore[no-untyped-def]
    table,  # int64 [P, COLUMNS]
    chunks,  # int32 [N, 2]
    rates,  # float64 [3]
    factors,  # float32 [3, P]
    found,  # float32 [2]
    count,  # P
    beta2,
    new1,  # 1 - beta1
    new2,  # 1 - beta2
    eps,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    HALF: tl.constexpr,  # float16; else bfloat16
):
    """A chunk of a parameter: AdamW, then the teacher's average, then the copies of both."""
    program = tl.program_id(0)
    parameter = tl.load(chunks + 2 * program)
    row = table + parameter * COLUMNS
    first = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    size = tl.load(row + 8)
    flags = tl.load(row + 9)
    learns = flags % 2 == 1
    weights = _address(row, 0, ALIGNED).to(tl.pointer_type(tl.float32))
    grads = _address(row, 1, ALIGNED).to(tl.pointer_type(tl.float32))
    averages = _address(row, 2, ALIGNED).to(tl.pointer_type(tl.float32))
    squares = _address(row, 3, ALIGNED).to(tl.pointer_type(tl.float32))
    teacher_address = _address(row, 5, ALIGNED)
    teachers = teacher_address.to(tl.pointer_type(tl.float32))
    half_address = _address(row, 6, ALIGNED)
    teacher_half_address = _address(row, 7, ALIGNED)
    if HALF:
        halves = half_address.to(tl.pointer_type(tl.float16))
        teacher_halves = teacher_half_address.to(tl.pointer_type(tl.float16))
    else:
        halves = half_address.to(tl.pointer_type(tl.bfloat16))
        teacher_halves = teacher_half_address.to(tl.pointer_type(tl.bfloat16))
    rate = tl.load(rates)
    keep = (1.0 - tl.where(flags >= 2, rate * tl.load(rates + 1), 0.0)).to(tl.float32)
    new = (1.0 - tl.load(rates + 2)).to(tl.float32)
    factor = tl.load(factors + parameter)
    step = tl.load(factors + count + parameter)
    root = tl.load(factors + 2 * count + parameter)
    if tl.load(found + 1) == 0.0:
        for start in range(0, tl.minimum(size - first, CHUNK), BLOCK):
            at = first + start + tl.arange(0, BLOCK)
            inside = at < size
            weight = tl.load(weights + at, mask=inside, other=0.0)
            if learns:
                grad = tl.load(grads + at, mask=inside, other=0.0) * factor
                average = tl.load(averages + at, mask=inside, other=0.0)
                average += new1 * (grad - average)
                square = tl.load(squares + at, mask=inside, other=0.0)
                square = beta2 * square + new2 * grad * grad
                weight = weight * keep - step * average / (tl.sqrt(square) * root + eps)
                tl.store(averages + at, average, mask=inside)
                tl.store(squares + at, square, mask=inside)
                tl.store(weights + at, weight, mask=inside)
            if half_address != 0:
                tl.store(halves + at, weight.to(halves.dtype.element_ty), mask=inside)
            if teacher_address != 0:
                value = tl.load(teachers + at, mask=inside, other=0.0)
                value += new * (weight - value)
                tl.store(teachers + at, value, mask=inside)
                if teacher_half_address != 0:
                    half = value.to(teacher_halves.dtype.element_ty)
                    tl.store(teacher_halves + at, half, mask=inside)
