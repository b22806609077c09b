"""What one training step launches on a GPU, the bytes and operations of it, and the time that
follows, without a GPU.

    python benchmarks/budget.py                      # ViT-S/16, 2 x 224 + 10 x 96, batch 64, fp16
    python benchmarks/budget.py --arch vit_b --batch-size 32 --device v100

The step runs on fake tensors and every launch is counted (`harness/budget_launches.py`); seconds
come from a table of rates (`harness/budget_rates.py`). They are predictions: the rates were fitted
to a profile of an H100. "without kernels" is the step as it was profiled, without the Triton
kernels of the blocks.
"""

import json
from typing import Any

from rich.console import Console

from ibeton.benchmarks.harness.budget_launches import CATEGORIES, Launches, Settings, step_launches
from ibeton.benchmarks.harness.budget_rates import DEVICES, Device, by_category
from ibeton.benchmarks.harness.measure import figures, integer, make_parser
from ibeton.command import run_or_exit
from ibeton.model import ModelConfig
from ibeton.model.config import RECOMPUTE
from ibeton.progress import plain_console
from ibeton.training.precision import DTYPES


def summary(launches: list[Launches], device: Device) -> dict[str, dict[str, float]]:
    """category -> launches, bytes, flops and predicted seconds; "total" besides."""
    rows: dict[str, dict[str, float]] = {}
    for name in (*CATEGORIES, "total"):
        some = [x for x in launches if name in (x.category, "total")]
        if some:
            rows[name] = {
                "launches": sum(x.kernels for x in some),
                "bytes": sum(x.bytes for x in some),
                "flops": sum(x.flops for x in some),
                "seconds": sum(by_category(some, device).values()),
            }
    return rows


def show(title: str, rows: dict[str, dict[str, float]], images: int, console: Console) -> None:
    table = figures("category", "launches", "GB", "TFLOP", "ms", title=title)
    for name, row in rows.items():
        if name == "total":
            table.add_section()
        table.add_row(
            name,
            f"{row['launches']:.0f}",
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['flops'] / 1e12:.2f}" if row["flops"] else "",
            f"{1e3 * row['seconds']:.2f}",
        )
    console.print(table)
    console.print(f"predicted: {images / rows['total']['seconds']:,.0f} images/s on the device")


def main() -> None:
    parser = make_parser(__doc__, rounds=0)
    parser.add_argument("--arch", default="vit_s")
    parser.add_argument("--batch-size", type=integer(1), default=64)
    parser.add_argument("--precision", choices=("fp16", "bf16"), default="fp16")
    parser.add_argument("--recompute", choices=RECOMPUTE, default="off")
    parser.add_argument("--device", choices=tuple(DEVICES), default="h100")
    args = parser.parse_args()
    if args.precision == "bf16" and args.device == "v100":
        parser.error("--precision bf16: a V100 has no bf16; give fp16")
    console, device, images = plain_console(width=80), DEVICES[args.device], args.batch_size
    results: dict[str, Any] = {}
    for name, kernels in (("without kernels", False), ("with kernels", True)):
        model = ModelConfig(arch=args.arch, recompute=args.recompute if kernels else "on")
        dtype, capability = DTYPES[args.precision], device.capability
        settings = Settings(model, images, 96, dtype, kernels, capability)
        results[name] = summary(step_launches(settings), device)
        title = f"{name}: {args.arch}, batch {images}, {args.precision}, {args.device}"
        show(title, results[name], images, console)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    run_or_exit(main)
