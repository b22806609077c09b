"""From launches to seconds: the rates of devices.

A launch takes the longest of its bytes over the bandwidth that its category reaches, its operations
over the matrix rate, and the shortest time of a kernel; two categories have a fixed time besides.
The shares of the bandwidth were fitted to the profile at batch 64, the fixed times also to that at
batch 256, those of our kernels to a profile with them (all in tests/benchmarks/test_budget.py).
A100 and V100 are assumed to reach the same shares: nothing was measured there.
"""

from typing import NamedTuple

from ibeton.benchmarks.harness import budget_launches as b
from ibeton.benchmarks.harness.budget_launches import Launches


class Device(NamedTuple):
    """What a device reaches: `memory` bytes/s of a large copy, read and write together, `matrix`
    FLOP/s of a large product in half precision, `attention` FLOP/s of fused attention on short
    sequences. Its architecture is sm_`capability`."""

    memory: float
    matrix: float
    attention: float
    capability: int


DEVICES = {
    "h100": Device(2.48e12, 763e12, 75e12, 90),  # measured, 2026-11-26, torch 2.11
    "a100": Device(1.7e12, 250e12, 50e12, 80),  # 80 GB; from data sheets, 80 % of the peaks
    "v100": Device(0.75e12, 100e12, 18e12, 70),  # from data sheets, 80 % of the peaks
}
SHORTEST = 2e-6  # seconds of a kernel that has next to nothing to do
PRODUCT_SHARE = 0.75  # of the matrix rate, at the widths of a ViT
SHARES = {  # of the copy bandwidth
    b.PRODUCTS: 1.0,
    b.ATTENTION: 1.0,
    b.COPIES: 0.83,
    b.ELEMENTWISE: 0.96,
    b.NORM: 0.60,
    b.NORM_BACKWARD: 1.18,
    b.GELU: 1.15,  # above 1: the input is still in the cache
    b.GELU_BACKWARD: 1.2,
    b.CONCATENATION: 0.67,
    b.SUMS: 0.88,
    b.OPTIMIZER: 1.2,
    b.ROW_KERNELS: 1.02,
    b.STREAM_KERNELS: 1.02,
}
# Seconds on top, of an operator with too few blocks to fill the device (gamma and beta; biases)
FIXED = {b.NORM_BACKWARD: 194e-6, b.SUMS: 18e-6}
GRAPH_HOST_S = 4e-3  # of the host, for a step that is replayed as a CUDA graph


def seconds(launch: Launches, device: Device) -> float:
    """Predicted seconds of one launch on the device."""
    moved = launch.bytes / (device.memory * SHARES[launch.category])
    is_attention = launch.category == b.ATTENTION
    rate = device.attention if is_attention else device.matrix * PRODUCT_SHARE
    fixed = FIXED.get(launch.category, 0.0)
    return fixed + max(moved, launch.flops / rate, launch.kernels * SHORTEST)


def by_category(launches: list[Launches], device: Device) -> dict[str, float]:
    """Predicted seconds of each category that occurs."""
    totals: dict[str, float] = {}
    for launch in launches:
        totals[launch.category] = totals.get(launch.category, 0.0) + seconds(launch, device)
    return totals


def predicted_seconds(launches: list[Launches], device: Device) -> float:
    """Predicted seconds of a step: of the device, or of the host if it is the slower one."""
    return max(sum(by_category(launches, device).values()), GRAPH_HOST_S)
