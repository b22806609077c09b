"""How this package launches Triton kernels, and how a benchmark counts launches without a GPU."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of PyTorch without CUDA come without it
    triton = None
    tl = SimpleNamespace(constexpr=None)  # for the signatures of kernels, which nothing calls


jit = (lambda kernel: kernel) if triton is None else triton.jit
ROW_TILE = 1024  # values of each tensor that a program holds, unless a row is longer


class Launch(NamedTuple):
    """One launch of a Triton kernel."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]  # and options of the compiler
    touches: list[Tensor]  # read or written beside the arguments; twice if both

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def tensors(self) -> list[Tensor]:
        """What the kernel reads or writes."""
        return [*(a for a in self.arguments if isinstance(a, Tensor)), *self.touches]


Observer = Callable[[Launch], None]
_observers: list[Observer] = []
_stands_for = 0  # while launches are counted, the capability of the GPU that they are counted for
_switched_off = False
MATRIX_UNITS = 80  # sm_80 and later have matrix units that Triton can use


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def counted() -> bool:
    """Whether launches are counted, on tensors that stand for those of a GPU."""
    return _stands_for > 0


def kernels_run_on(x: Tensor) -> bool:
    """Whether Triton kernels take `x`: it is on CUDA and not float64, Triton is installed, and the
    kernels are not switched off. In the interpreter, or while launches are counted, the device does
    not matter."""
    if triton is None or _switched_off or x.dtype is torch.float64:
        return False
    return x.is_cuda or counted() or interpreted()


def switch_off(off: bool = True) -> None:
    """Run PyTorch's own operations instead of the kernels from now on, in this process."""
    global _switched_off
    _switched_off = off


def matrix_units(x: Tensor) -> bool:
    """Whether Triton multiplies matrices like `x` at the speed of the device: in half precision on
    sm_80 and later. Always true in the interpreter, so that it shows what those devices compute."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return interpreted() or (half and capability(x) >= MATRIX_UNITS)


def capability(x: Tensor) -> int:
    """The compute capability, 80 for sm_80 and so on, of the device of `x`, or of the one that
    launches are counted for; 0 in the interpreter."""
    if counted():
        return _stands_for
    if not x.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    touches: list[Tensor] | None = None,
    **constants: Any,
) -> None:
    """Run a Triton kernel, or only report it while `counting`. An empty grid runs nothing.
    `touches`: tensors that the kernel finds by their addresses."""
    for observer in _observers:
        observer(Launch(kernel, arguments, constants, touches or []))
    if not counted() and all(grid):
        kernel[grid](*arguments, **constants)


def row_tile(width: int) -> dict[str, Any]:
    """Constants of a kernel whose programs take ROWS whole rows of WIDTH values at a time."""
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "ROWS": max(1, ROW_TILE // block), "BLOCK": block, "num_warps": 4}


@contextmanager
def counting(observer: Observer, capability: int = 90) -> Iterator[None]:
    """Report the launches inside to `observer`, as on sm_`capability`, without running them."""
    global _stands_for
    before, _stands_for = _stands_for, capability
    try:
        with listening(observer):
            yield
    finally:
        _stands_for = before


@contextmanager
def listening(observer: Observer) -> Iterator[None]:
    """Also report the launches inside to `observer`."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
