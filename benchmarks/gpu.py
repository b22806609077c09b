"""Everything that wants a GPU, in one call of under eight minutes: tests, then benchmarks.

    python benchmarks/gpu.py --out figures             # on a machine with a GPU
    python benchmarks/gpu.py --out figures --rehearse  # without one: each part at its smallest

Runs the GPU tests, the croppers, each kernel, and the model's step against its plain form (ViT-S
and ViT-B, fp16 and bf16), writes what each prints and its JSON into --out, and ends with a table:
what is claimed, what was measured. Parts are processes with a time limit, so one that fails costs
no other.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from ibeton.benchmarks.harness.measure import in_words, machine, quartiles

ROOT = Path(__file__).resolve().parents[1]
KERNEL_SHARE = 100 / 1.3  # % of copy speed: within 1.3 times the time of its bytes
SPEED, MEMORY, PEAK = 3.0, 0.45, 0.40  # of the baseline's images/s and memory; of matrix products
HALF = ("--precision", "fp16", "--batch-size", "64")
PART_LIMIT_S, REHEARSAL_LIMIT_S = 180, 900
SMALL_MODEL = (
    *("--arch", "vit_t", "--batch-size", "2", "--local-crops-number", "2", "--out-dim", "256"),
    *("--rounds", "2", "--device", "cpu"),
)


class Part(NamedTuple):
    """One process: `python *arguments`; `json` is what it writes, "" for nothing."""

    name: str
    arguments: list[str]
    json: str = ""


class Claim(NamedTuple):
    """A row of the last table."""

    what: str
    wanted: str
    measured: str
    holds: bool


def parts(out: Path, rehearse: bool) -> list[Part]:
    """What is run, in the order of worth: a session may be cut."""

    def bench(name: str, script: str, *options: str) -> Part:
        path = str(out / f"{name}.json")
        return Part(name, [f"benchmarks/{script}.py", *options, "--json", path], path)

    if rehearse:
        return [
            bench("crops", "crops_gpu", "--interpreted", "--rounds", "2"),
            bench("kernels_fp32", "kernels", "--images", "1", "--rounds", "2", "--device", "cpu"),
            bench("vit_t_fp32", "model", *SMALL_MODEL),
        ]
    steps = [
        bench(f"{arch}_{precision}", "model", "--arch", arch, "--precision", precision, *rest)
        for arch, precision, rest in (
            ("vit_s", "fp16", ("--batch-size", "64")),
            ("vit_s", "bf16", ("--batch-size", "64", "--no-ablation")),
            ("vit_b", "fp16", ("--batch-size", "32", "--no-ablation")),
        )
        if precision != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False)
    ]
    return [
        Part("tests", ["-m", "pytest", "-q", "-m", "gpu", "tests"]),
        bench("crops", "crops_gpu"),
        steps[0],
        bench("kernels_fp16", "kernels", "--precision", "fp16", "--images", "64"),
        *steps[1:],
    ]


def run(part: Part, out: Path, limit: float, console: Console) -> str:
    """Run it; what it prints goes to the screen and to a file. Returns "" or what went wrong."""
    console.rule(part.name)
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *part.arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            check=False,
        )
        text, problem = done.stdout, f"exit status {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode(errors="replace") if error.stdout else ""
        problem = f"not done in {limit:.0f} s"
    (out / f"{part.name}.txt").write_text(text)
    console.print(text[-6000:], markup=False, highlight=False, soft_wrap=True)
    console.print(f"{part.name}: {problem or 'done'}, {time.monotonic() - start:.0f} s")
    return problem


def step_seconds(figures: dict[str, Any], side: str) -> list[float]:
    """Of each round of benchmarks/model.py."""
    steps = figures["comparison"]["times"][side]
    return [sum(value for part, value in step.items() if part != "busy") for step in steps]


def speedup(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def model_claims(name: str, figures: dict[str, Any]) -> list[Claim]:
    """Images/s, memory and share of the peak of a run of benchmarks/model.py."""
    comparison, ours = figures["comparison"], step_seconds(figures, "ours")
    speed = speedup(step_seconds(figures, "baseline"), ours)
    memory = comparison["memory"]["ours"] / comparison["memory"]["baseline"]
    rate = comparison["flops"]["ours"] / statistics.median(ours)
    peak = rate / comparison["peak_flops"]
    return [
        Claim(f"{name}: images/s", f"{SPEED} x", f"{speed:.2f} x", speed >= SPEED),
        Claim(f"{name}: memory", f"{MEMORY} x", f"{memory:.2f} x", memory <= MEMORY),
        Claim(f"{name}: of matrix products", f"{PEAK:.0%}", f"{peak:.0%}", peak >= PEAK),
    ]


def kernel_claims(figures: dict[str, Any]) -> list[Claim]:
    """Each loss kernel against the bytes that it moves; linear layers are bound elsewhere."""
    claims = []
    for name, result in figures["kernels"].items():
        if "linear" in name:
            continue
        turns = zip(result["seconds"]["copy"], result["seconds"]["fused"], strict=True)
        share = 100 * statistics.median(copy * result["bytes"] / own for copy, own in turns)
        wanted = f"{KERNEL_SHARE:.0f} % of copy"
        claims.append(Claim(name, wanted, f"{share:.0f} %", share >= KERNEL_SHARE))
    return claims


def crop_claims(figures: dict[str, Any]) -> list[Claim]:
    """The croppers need only be quicker than the step that waits for them."""
    times = {name: quartiles(values)[0] for name, values in figures["seconds_a_batch"].items()}
    longer = times["steps from the feed"] / times["step alone"] - 1
    return [Claim("step with crops behind it", "10 % longer", f"{longer:.1%}", longer <= 0.10)]


def claims(done: list[Part]) -> list[Claim]:
    rows: list[Claim] = []
    for part in done:
        if not part.json:
            continue
        figures = json.loads(Path(part.json).read_text())
        if part.name == "crops":
            rows += crop_claims(figures)
        elif part.name.startswith("kernels"):
            rows += kernel_claims(figures)
        else:
            rows += model_claims(part.name, figures)
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for the figures")
    parser.add_argument("--minutes", type=float, default=8, help="what begins later is left out")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at the smallest size")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("no CUDA device is usable here; --rehearse shows that all of it runs")
    return args


def main() -> int:
    """0 where every part ran; what was measured does not decide."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    out, console = args.out.resolve(), Console(width=110)
    limit = REHEARSAL_LIMIT_S if args.rehearse else PART_LIMIT_S
    end = time.monotonic() + (3 * limit if args.rehearse else 60 * args.minutes)
    done: list[Part] = []
    failed: dict[str, str] = {}
    for part in parts(out, args.rehearse):
        left = end - time.monotonic()
        problem = run(part, out, min(left, limit), console) if left > 5 else "no time left"
        if problem:
            failed[part.name] = problem
        else:
            done.append(part)
    table = Table(title="claims")
    for heading in ("what", "claimed", "measured", ""):
        table.add_column(heading)
    for claim in claims(done):
        table.add_row(claim.what, claim.wanted, claim.measured, "" if claim.holds else "short")
    console.print(table)
    about = machine("torch", "triton")
    if torch.cuda.is_available():
        about["processor"] = torch.cuda.get_device_name()
    console.print(in_words(about))
    if args.rehearse:
        console.print("a rehearsal on the CPU: the claims are about GPUs")
    for name, problem in failed.items():
        console.print(f"{name}: {problem}, see {out / name}.txt")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
