"""What plans are made of: data sheets of devices, and rates that were measured.

Sheet figures are the vendors', without sparsity; fp32 is without TF32, as PyTorch multiplies by
default.
"""

from dataclasses import dataclass

Range = tuple[float, float]  # from slow to fast


@dataclass(frozen=True)
class Device:
    """TFLOP/s of matrix products by precision, GB/s, GiB, and the source."""

    peak: dict[str, float]
    bandwidth: float
    memory: float
    source: str


def _sheet(half: float, full: float, bandwidth: float, memory: float, source: str) -> Device:
    return Device({"fp16": half, "bf16": half, "fp32": full}, bandwidth, memory, source)


DEVICES = {
    "v100": Device({"fp16": 125, "fp32": 15.7}, 900, 32, "V100 data sheet, SXM2"),
    "v100-16": Device({"fp16": 125, "fp32": 15.7}, 900, 16, "V100 data sheet, SXM2"),
    "a100": _sheet(312, 19.5, 2039, 80, "A100 data sheet, SXM"),
    "a100-40": _sheet(312, 19.5, 1555, 40, "A100 data sheet, SXM"),
    "h100": _sheet(989, 67, 3350, 80, "H100 data sheet, SXM"),
    "h200": _sheet(989, 67, 4800, 141, "H200 data sheet, SXM"),
    "t4": Device({"fp16": 65, "fp32": 8.1}, 320, 16, "T4 data sheet"),
    "rtx4090": _sheet(165.2, 82.6, 1008, 24, "Ada architecture whitepaper"),
}


@dataclass(frozen=True)
class Measured:
    """A step of ViT-S/16, 2 x 224 + 10 x 96 views, fp16, on one H100 (80 GB, SXM)."""

    images: int
    products_ms: float  # of matrix products and attention
    passes_ms: float  # of all else that the GPU does
    images_per_s: float
    gib: float  # above what was allocated before


# Commit 216b8a1, November 2026, torch 2.11: before most passes over memory were fused.
STEP = Measured(images=64, products_ms=19.0, passes_ms=42.0, images_per_s=963, gib=5.5)
STEP_DEVICE, STEP_ARCH, STEP_GFLOP = "h100", "vit_s", 126.0  # GFLOP per image
# From measured to expected: a third of those passes is what fusing can leave. Not measured yet.
PASSES: Range = (1.0, 0.3)
# Other widths fill a GPU better or worse; other devices reach other shares of their sheets.
SPREAD: Range = (1.3, 0.8)
# The published trainer's own loop on the same H100, batch 64: 152.5 ms against 66.5 ms.
PUBLISHED = 152.5 / 66.5

# Photos/s of one core: ImageNet photos (0.2 megapixels), 2 x 224 + 10 x 96 views. The slow end is
# with all hyper-threads busy, 1/1.3 of one alone (docs/results.md). "published" was measured on one
# older machine; decoding alone: Pillow 410, libjpeg-turbo 572.
LOADERS: dict[str, tuple[float, Range]] = {
    "published": (410, (18, 23)),
    "pil": (410, (33 / 1.3, 33)),
    "ffcv on cpu": (572, (197 / 1.3, 197)),
    "ffcv": (572, (572 / 1.3, 572)),
}
VIEW_PIXELS = 2 * 224**2 + 10 * 96**2


def loader_rate(loader: str, view_pixels: int) -> Range:
    """Photos/s of one core for views of `view_pixels` together: decoding stays, cropping grows with
    the pixels that it makes."""
    decode, rates = LOADERS[loader]

    def scaled(rate: float) -> float:
        slower = max(1.0, rates[1] / rate)
        crop = max(0.0, 1 / rate - slower / decode)
        return 1 / (slower / decode + crop * view_pixels / VIEW_PIXELS)

    return scaled(rates[0]), scaled(rates[1])
