"""Sums over rows in two steps: each program of a backward sums its own rows, then one kernel adds
up the programs. The order is fixed, so the same step gives the same bits."""

import torch
from torch import Tensor

from ibeton.model.kernels.launch import jit, launch, tl, triton

PROGRAMS = 512  # of a backward with sums: several for each multiprocessor
TOKENS = 32  # rows for each program at least
COLUMNS, ROWS = 64, 32  # of a tile of the second step


def partial_sums(x: Tensor, columns: int) -> Tensor:
    """Memory for the sums over the rows of x [T, ...]: float32 [P, columns], not initialized."""
    programs = min(PROGRAMS, max(4, -(-len(x) // TOKENS)))
    return torch.empty(programs, columns, dtype=torch.float32, device=x.device)


def shares(partial: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    """`partial` [P, ...] split in proportion to the counts, at least one row for each."""
    rows = [max(1, len(partial) * count // max(1, sum(counts))) for count in counts]
    rows[0] += len(partial) - sum(rows)
    return partial.split(rows)


def column_sums_reference(partial: Tensor) -> Tensor:
    """[P, W] -> [W]."""
    return partial.sum(dim=0)


def column_sums(partial: Tensor) -> Tensor:
    """`column_sums_reference` by the kernel. partial: float32, contiguous."""
    programs, width = partial.shape
    sums = partial.new_empty(width)
    grid = (triton.cdiv(width, COLUMNS),)
    launch(
        _column_sums_kernel, grid, partial, sums, programs, width, ROWS=ROWS, COLUMNS=COLUMNS,
        num_warps=4,
    )  # fmt: skip
    return sums


@jit
def _column_sums_kernel(  # type: ignore[no-untyped-def]
    partial,  # float32 [P, W]
    sums,  # float32 [W], out
    programs,  # P
    width,  # W
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums of a strip of columns."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        total += tl.load(partial + at, mask=mask, other=0.0)
    tl.store(sums + column, tl.sum(total, axis=0), mask=column < width)
