"""From the rates of a machine to images/s, hours, and what will limit."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ibeton.training.forecast.estimate import Rates, StepShape, step_seconds
from ibeton.training.timing.flops import matrix_rate

Range = tuple[float, float]  # from the pessimist's rates to the optimist's
_SLICE = 0.02  # seconds over which a rate is measured once
_SLICES = 12
_TOKENS = 1024  # of the products that are measured on a CPU: a few images


@dataclass(frozen=True)
class LoaderCost:
    """Seconds of one core for one photo: to decode it, and to cut all of its views."""

    decode: float
    crop: float

    @property
    def seconds(self) -> float:
        return self.decode + self.crop


@dataclass(frozen=True)
class Forecast:
    """Images/s of one process: all together, and of each side that could limit them."""

    images_per_s: float
    sides: dict[str, float]

    @property
    def limit(self) -> str:
        return min(self.sides, key=lambda side: self.sides[side])


def forecast(
    shape: StepShape, rates: Rates, loader: LoaderCost, workers: int, cores: float, threads: int = 0
) -> Forecast:
    """Loader and model side by side: the slower one limits. `cores` and `workers` are those of one
    process. A model on a CPU takes `threads` of these cores from the loader (0: it has a GPU)."""
    model = step_seconds(shape, rates) / shape.images
    sides = {"model": 1 / model, "loader": min(workers, cores) / loader.seconds}
    if threads:
        sides["cores"] = cores / (model * min(threads, cores) + loader.seconds)
    return Forecast(min(sides.values()), sides)


def hours(images: float, images_per_s: float) -> float:
    return images / images_per_s / 3600


def measured_rates(
    shape: StepShape, device: torch.device, dtype: torch.dtype | None
) -> tuple[Rates, Rates]:
    """Rates of this device, in about a second: the quartiles of some slices of time, which differ
    where others use the machine. `dtype` of matrix products, None: float32. On a CPU,
    products are of the model's width, and passes over memory those of its norms, GELUs and sums,
    whose arithmetic counts too. Raises torch.OutOfMemoryError where the GPU is full."""
    with torch.inference_mode():
        measure = _gpu_rates if device.type == "cuda" else _cpu_rates
        measured = measure(shape, device, dtype)
    low, high = (Rates(*rates) for rates in zip(*measured, strict=True))
    return low, high


def _gpu_rates(
    shape: StepShape, device: torch.device, dtype: torch.dtype | None
) -> tuple[Range, Range, Range, Range]:
    x = torch.randn(2**25, device=device)
    products = _slices(lambda: matrix_rate(device, dtype, seconds=_SLICE))
    passes = _slices(lambda: _work_a_second(lambda: x.mul_(1.0), 2.0 * x.nbytes, device))
    low, high = _slices(lambda: _work_a_second(lambda: x[:1].mul_(1.0), 1.0, device))
    attention = _attention_rate(shape, device, dtype)
    return products, attention, passes, (1 / low, 1 / high)


def _cpu_rates(
    shape: StepShape, device: torch.device, dtype: torch.dtype | None
) -> tuple[Range, Range, Range, Range]:
    channels = shape.model.backbone_shape()[0]
    hidden = int(channels * shape.model.mlp_ratio)
    x, y = torch.randn(_TOKENS, channels), torch.randn(_TOKENS, hidden)
    a, weight = x.to(dtype), torch.randn(hidden, channels, dtype=dtype)
    product, scale = 2.0 * _TOKENS * channels * hidden, torch.ones(channels)

    def passes_over() -> None:
        F.layer_norm(x, (channels,), scale, scale)
        F.gelu(y)
        torch.add(x, x)

    moved = 5.0 * x.nbytes + 2.0 * y.nbytes
    products = _slices(lambda: _work_a_second(lambda: F.linear(a, weight), product, device))
    passes = _slices(lambda: _work_a_second(passes_over, moved, device))
    return products, _attention_rate(shape, device, dtype), passes, (0.0, 0.0)


def _attention_rate(shape: StepShape, device: torch.device, dtype: torch.dtype | None) -> Range:
    """FLOP/s of the attention of the step's global views, on a CPU of one image's."""
    channels, _, heads = shape.model.backbone_shape()
    samples, tokens = shape.packed()[0]
    if device.type == "cpu":
        samples = min(samples, shape.views[0][0])
    size = (samples, heads, tokens, channels // heads)
    x = torch.randn(size, device=device, dtype=dtype)
    work = 4.0 * samples * tokens**2 * channels
    return _slices(
        lambda: _work_a_second(lambda: F.scaled_dot_product_attention(x, x, x), work, device)
    )


def _slices(rate: Callable[[], float]) -> Range:
    """Lower and upper quartile of some measurements, after one that is thrown away."""
    rate()
    low, _, high = statistics.quantiles([rate() for _ in range(_SLICES)], method="inclusive")
    return low, high


def _work_a_second(act: Callable[[], object], work: float, device: torch.device) -> float:
    begin, times = time.perf_counter(), 0
    while True:
        act()
        times += 1
        if times % 4 == 0 or device.type == "cpu":
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if (gone := time.perf_counter() - begin) > _SLICE:
                return work * times / gone
