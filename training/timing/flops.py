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
    on_gpu = device.type == "cuda"
    n = 8192 if on_gpu else 1024
    a = torch.randn(n, n, device=device, dtype=dtype or torch.float32)
    _product_seconds(a)  # libraries are loaded
    end = time.perf_counter() + seconds
    best = _product_seconds(a)
    while time.perf_counter() < end:
        best = min(best, _product_seconds(a))
    return 2 * n**3 / best


def _product_seconds(a: Tensor) -> float:
    begin = time.perf_counter()
    torch.mm(a, a)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - begin
