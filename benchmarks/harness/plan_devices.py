"""What plans are made of where nothing is measured: devices, loaders, and how much of them is had.

Figures of devices are those of the vendors' data sheets, without sparsity.
"""

from dataclasses import dataclass

from ibeton.training.forecast.estimate import Rates
from ibeton.training.forecast.photo_cost import SHARED_CORES
from ibeton.training.forecast.projection import LoaderCost

_T, _G = 1e12, 1e9


@dataclass(frozen=True)
class Device:
    """FLOP/s of matrix products by precision (those that it has), bytes/s, GiB, and the source."""

    peak: dict[str, float]
    bandwidth: float
    memory: float
    source: str


def _sheet(half: float, full: float, bandwidth: float, memory: float, source: str) -> Device:
    peak = {"fp16": half * _T, "bf16": half * _T, "fp32": full * _T}
    return Device(peak, bandwidth * _G, memory, source)


def _no_bf16(device: Device) -> Device:
    peak = {name: peak for name, peak in device.peak.items() if name != "bf16"}
    return Device(peak, device.bandwidth, device.memory, device.source)


# fp32 is without TF32, as PyTorch multiplies by default. Half precision adds up in float32.
DEVICES = {
    "v100": _no_bf16(_sheet(125, 15.7, 900, 32, "NVIDIA V100 data sheet, SXM2 32 GB")),
    "v100-16": _no_bf16(_sheet(125, 15.7, 900, 16, "NVIDIA V100 data sheet, SXM2 16 GB")),
    "a100": _sheet(312, 19.5, 2039, 80, "NVIDIA A100 data sheet, SXM 80 GB"),
    "a100-40": _sheet(312, 19.5, 1555, 40, "NVIDIA A100 data sheet, SXM 40 GB"),
    "h100": _sheet(989, 67, 3350, 80, "NVIDIA H100 data sheet, SXM"),
    "h200": _sheet(989, 67, 4800, 141, "NVIDIA H200 data sheet, SXM"),
    "t4": _no_bf16(_sheet(65, 8.1, 320, 16, "NVIDIA T4 data sheet")),
    "rtx4090": _sheet(165.2, 82.6, 1008, 24, "NVIDIA Ada architecture whitepaper, RTX 4090"),
}

# How much of a sheet's rates the operations of a ViT get, from the pessimist to the optimist.
MATRIX = (0.35, 0.7)
ATTENTION = (0.2, 0.4)
BANDWIDTH = (0.6, 0.85)
LAUNCH = (10e-6, 5e-6)  # seconds of the host
REASONS = [
    f"matrix products get {MATRIX[0]:.0%} to {MATRIX[1]:.0%} of the sheet's rate: large square ones"
    " reach the upper end, those of narrow ViTs fill the GPU in waves that do not come out even",
    f"fused attention gets {ATTENTION[0]:.0%} to {ATTENTION[1]:.0%}: its products are 64 wide and"
    " wait for a softmax (from memory: 25 to 40 % are reported for an A100)",
    f"passes over memory get {BANDWIDTH[0]:.0%} to {BANDWIDTH[1]:.0%} of the sheet's bandwidth: a"
    " plain copy reaches the upper end, norms and sums over rows less",
    f"a launch takes the host {LAUNCH[1] * 1e6:.0f} to {LAUNCH[0] * 1e6:.0f} us in PyTorch",
    "the exchange of gradients is taken to hide behind the backward; the network is not looked at",
]


def device_rates(device: Device, precision: str) -> tuple[Rates, Rates]:
    """What the pessimist and the optimist expect. Raises ValueError for a precision that the device
    has not."""
    if precision not in device.peak:
        raise ValueError(f"--precision {precision}: the device has {', '.join(device.peak)}")
    peak = device.peak[precision]
    shares = zip(MATRIX, ATTENTION, BANDWIDTH, LAUNCH, strict=True)
    pessimist, optimist = (
        Rates(peak * matrix, peak * attention, device.bandwidth * memory, launch)
        for matrix, attention, memory, launch in shares
    )
    return pessimist, optimist


# One core's seconds for an ImageNet photo as it comes (0.20 megapixels) with 2 x 224 + 10 x 96
# views: pessimist, optimist. Rates in images/s.
VIEW_PIXELS = 2 * 224**2 + 10 * 96**2
_PILLOW, _TURBO = 410, 572  # decode alone: Pillow; libjpeg-turbo into packed pixels


def _cost(decode: float, whole: float, slower: float) -> LoaderCost:
    return LoaderCost(slower / decode, slower * (1 / whole - 1 / decode))


COSTS = {
    # Pillow and torchvision in worker processes: 18 - 23, cores of an older machine.
    "published": (_cost(_PILLOW, 18, 1.0), _cost(_PILLOW, 23, 1.0)),
    # docs/results.md, "Loaders", one core; with more, cores share what they are made of.
    "pil": (_cost(_PILLOW, 33, SHARED_CORES), _cost(_PILLOW, 33, 1.0)),
    "ffcv on cpu": (_cost(_TURBO, 197, SHARED_CORES), _cost(_TURBO, 197, 1.0)),
    "ffcv": (_cost(_TURBO, _TURBO, SHARED_CORES), _cost(_TURBO, _TURBO, 1.0)),
}


def loader_reason(name: str) -> str:
    """Why costs of this loader are a range."""
    if name == "published":
        return "the published loader does 18 to 23 images/s a core, measured on one machine"
    return (
        f"the {name} loader is that of one core of an AMD EPYC; with all cores busy, where they are"
        f" halves of real ones, each does 1/{SHARED_CORES} of it (measured: 1/1.2 to 1/1.3)"
    )


def loader_costs(name: str, view_pixels: int) -> tuple[LoaderCost, LoaderCost]:
    """Of photos like ImageNet's, for views of `view_pixels` together: crops grow with the pixels
    that they make."""
    share = view_pixels / VIEW_PIXELS
    pessimist, optimist = (LoaderCost(c.decode, c.crop * share) for c in COSTS[name])
    return pessimist, optimist
