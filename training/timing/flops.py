"""Floating-point operations: those of a step, and how many the device can do in a second."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ibeton.model.kernels.launch import Launch, listening
from ibeton.model.kernels.packed_attention import attention_flops


@contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """A context that counts the operations (two a multiply-add) of the matrix products, attention
    and convolutions that run in it: `get_total_flops()`. Other arithmetic is not counted."""
    aten = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    mapping: dict[Any, Any] = {  # the CPU's attention is unknown to the counter
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    counter = _FlopCounter(display=False, custom_mapping=mapping)
    with counter, listening(counter.add_kernel):
        yield counter


class _FlopCounter(FlopCounterMode):
    """With those of our attention kernels."""

    kernels = 0

    def add_kernel(self, launch: Launch) -> None:
        self.kernels += attention_flops(launch)

    def get_total_flops(self) -> int:
        return super().get_total_flops() + self.kernels


def matrix_rate(device: torch.device, dtype: torch.dtype | None, seconds: float = 0.3) -> float:
    """FLOP/s of large matrix products in `dtype` (None: float32): the best of those that fit in
    `seconds`, as anything else on the machine only slows them."""
    # On a CPU the smaller one may end before another program interrupts it.
    sides = (8192,) if device.type == "cuda" else (512, 1024)
    matrices = [torch.randn(n, n, device=device, dtype=dtype or torch.float32) for n in sides]
    for a in matrices:
        _product_rate(a)  # libraries are loaded
    best, end = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        best = max(best, *map(_product_rate, matrices))
    return best


def _product_rate(a: Tensor) -> float:
    begin = time.perf_counter()
    torch.mm(a, a)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return 2 * len(a) ** 3 / (time.perf_counter() - begin)
