"""Everything that needs a GPU, in one call of under eight minutes: tests, then benchmarks.

    python benchmarks/gpu.py --out figures             # on a machine with a GPU
    python benchmarks/gpu.py --out figures --rehearse  # without one: each part at its smallest

Runs the GPU tests, the step of ours as a CUDA graph, eager and plain, the memory against the plain
step, each kernel, training end to end, and the croppers. Writes what each prints and its JSON into
--out, and ends with a table: what is claimed, and what was measured. Parts are processes with time
limits of their own, most important first, so one that fails or is cut costs no other.
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
from ibeton.progress import plain_console

ROOT = Path(__file__).resolve().parents[1]
REHEARSAL_LIMIT_S = 3600  # of each part; it takes seconds, unless the machine is busy
TO_MEASURE = "to be measured"
KERNEL_SHARE = 60.0  # % of copy bandwidth
SPEED, MEMORY, PEAK = 3.0, 0.45, 0.40  # of the plain step's images/s and memory; of matrix products
IMAGES_S, SMALL_IMAGES_S = 1900, 4 * 4200  # of an H100: ViT-S at batch 64, the small model
HOST_MS, LAUNCHES = 5.0, 500  # of a step; as a graph, and without
MODEL, SMALL = "vit_s:fp16:64", "small:fp16:256"
TINY = (
    *("--arch", "vit_t", "--batch-size", "2", "--local-crops-number", "2", "--out-dim", "256"),
    *("--rounds", "2", "--device", "cpu"),
)
END_TO_END = (
    *("--arch", "vit_t", "--embed-dim", "32", "--depth", "2", "--num-heads", "2"),
    *("--batch-size", "2", "--out-dim", "64", "--rounds", "1", "--steps", "1"),
)


class Part(NamedTuple):
    """One process, `python *arguments`, with a limit in seconds; `json` is what it writes, "" for
    nothing."""

    name: str
    arguments: list[str]
    limit: float
    json: str = ""
    interpreted: bool = False  # Triton's interpreter runs the kernels


class Claim(NamedTuple):
    """A row of the last table. `holds` is None for what was not measured."""

    what: str
    wanted: str
    measured: str = TO_MEASURE
    holds: bool | None = None


def parts(out: Path, rehearse: bool) -> list[Part]:
    """What is run, most important first: a session may be cut."""

    def bench(name: str, limit: float, script: str, *options: str) -> Part:
        path = str(out / f"{name}.json")
        return Part(name, [f"benchmarks/{script}.py", *options, "--json", path], limit, path)

    def end_to_end(limit: float, *options: str) -> Part:
        report = out / "end_to_end"
        script = ["benchmarks/throughput.py", *options, "--report", str(report)]
        return Part("end_to_end", script, limit, str(report / "throughput.json"))

    if rehearse:
        limit = REHEARSAL_LIMIT_S
        kernels = bench("kernels", limit, "kernels", "--rounds", "1", "--device", "cpu")
        return [
            bench("steps", limit, "graph", "--cases", "tiny:fp32:2", "--device", "cpu"),
            bench("memory", limit, "model", *TINY),
            kernels._replace(interpreted=True),
            end_to_end(limit, *END_TO_END),
            bench("crops", limit, "crops_gpu", "--interpreted", "--rounds", "2"),
        ]
    half = ("--precision", "fp16")
    graph_tests = ["-m", "pytest", "-q", "-n", "4", "-m", "gpu", "tests/model"]
    other_tests = [*graph_tests[:-1], "tests", "--ignore", "tests/model"]
    return [
        Part("tests_model", graph_tests, 120),
        bench("steps", 130, "graph", "--seconds", "90"),
        bench("memory", 60, "model", *half, "--batch-size", "64"),
        bench("kernels", 45, "kernels", *half, "--images", "64"),
        end_to_end(90, "--arch", "vit_s", "--batch-size", "64", "--rounds", "2"),
        Part("tests_other", other_tests, 90),
        bench("decode", 60, "loader", "--decode", "gpu", "--batch-size", "64", "--rounds", "3"),
        bench("crops", 60, "crops_gpu"),
    ]


def run(part: Part, out: Path, limit: float, console: Console) -> str:
    """Run it; what it prints goes to the screen and to a file. Returns "" or what went wrong."""
    console.rule(part.name)
    interpreter = {"TRITON_INTERPRET": "1"} if part.interpreted else {}
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *part.arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **interpreter},
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


def speedup(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def at_least(what: str, wanted: str, value: float, limit: float, form: str) -> Claim:
    return Claim(what, wanted, form.format(value), value >= limit)


def at_most(what: str, wanted: str, value: float, limit: float, form: str) -> Claim:
    return Claim(what, wanted, form.format(value), value <= limit)


def step_claims(figures: dict[str, Any]) -> list[Claim]:
    """Of benchmarks/graph.py: speed, the share of the peak, host time, and launches."""
    cases, rows = figures["cases"], []
    if (case := cases.get(MODEL)) and "seconds" in (graph := case.get("graph", {})):
        rate = case["images"] / graph["seconds"]
        share = case["flops"] / graph["seconds"] / case["peak_flops"]
        rows.append(at_least("ViT-S, batch 64", f"{IMAGES_S} images/s", rate, IMAGES_S, "{:,.0f}"))
        rows.append(at_least("of matrix products", f"{PEAK:.0%}", share, PEAK, "{:.0%}"))
        if "seconds" in (plain := case.get("plain", {})):
            ratio = plain["seconds"] / graph["seconds"]
            rows.append(at_least("against the plain step", f"{SPEED} x", ratio, SPEED, "{:.2f} x"))
    if "launches" in (eager := cases.get(MODEL, {}).get("eager", {})):
        count = eager["launches"]
        rows.append(at_most("launches, eager", f"at most {LAUNCHES}", count, LAUNCHES, "{:,}"))
    if "host" in (graph := cases.get("vit_s:fp16:8", {}).get("graph", {})):
        host = 1e3 * graph["host"]
        rows.append(at_most("host time of a graph", f"{HOST_MS} ms", host, HOST_MS, "{:.2f} ms"))
    if (case := cases.get(SMALL)) and "seconds" in (graph := case.get("graph", {})):
        rate, most = case["images"] / graph["seconds"], SMALL_IMAGES_S
        rows.append(at_least("192 x 9, batch 256", f"{most:,} images/s", rate, most, "{:,.0f}"))
    return rows


def memory_claims(figures: dict[str, Any]) -> list[Claim]:
    """Of benchmarks/model.py."""
    used = figures["comparison"]["memory"]
    share = used["ours"] / used["baseline"]
    return [at_most("memory of the plain step", f"{MEMORY} of it", share, MEMORY, "{:.2f}")]


def kernel_claims(figures: dict[str, Any]) -> list[Claim]:
    """Of benchmarks/kernels.py: each against a copy of its bytes, but for those that products
    bound."""
    claims = []
    for name, result in figures["kernels"].items():
        if "linear" in name or "products" in name:
            continue
        turns = zip(result["seconds"]["copy"], result["seconds"]["fused"], strict=True)
        share = 100 * statistics.median(copy * result["bytes"] / own for copy, own in turns)
        wanted = f"{KERNEL_SHARE:.0f} % of copy"
        claims.append(at_least(name, wanted, share, KERNEL_SHARE, "{:.0f} %"))
    return claims


def end_to_end_claims(figures: dict[str, Any]) -> list[Claim]:
    """Of benchmarks/throughput.py: loader and model together against the model alone."""
    rates = {name: statistics.median(each) for name, each in figures["images_per_s"].items()}
    both, alone = rates["both"], rates["model"]
    measured = f"{both / alone:.0%}, {both:,.0f} images/s"
    return [Claim("end to end", "95 % of the model alone", measured, both >= 0.95 * alone)]


def crop_claims(figures: dict[str, Any]) -> list[Claim]:
    """The croppers need only be faster than the step that waits for them."""
    times = {name: quartiles(values)[0] for name, values in figures["seconds_a_batch"].items()}
    longer = times["steps from the feed"] / times["step alone"] - 1
    return [at_most("step with crops behind it", "10 % longer", longer, 0.10, "{:.1%}")]


READERS = {
    "steps": step_claims,
    "memory": memory_claims,
    "kernels": kernel_claims,
    "end_to_end": end_to_end_claims,
    "crops": crop_claims,
}
CLAIMS = [  # in the order of the table; kernels come with their own names
    Claim("GPU tests of the model", "all pass"),
    Claim("ViT-S, batch 64", f"{IMAGES_S} images/s"),
    Claim("of matrix products", f"{PEAK:.0%}"),
    Claim("against the plain step", f"{SPEED} x"),
    Claim("memory of the plain step", f"{MEMORY} of it"),
    Claim("launches, eager", f"at most {LAUNCHES}"),
    Claim("host time of a graph", f"{HOST_MS} ms"),
    Claim("192 x 9, batch 256", f"{SMALL_IMAGES_S:,} images/s"),
    Claim("end to end", "95 % of the model alone"),
    Claim("step with crops behind it", "10 % longer"),
    Claim("other GPU tests", "all pass"),
]
TESTS = {"tests_model": "GPU tests of the model", "tests_other": "other GPU tests"}


def claims(outcomes: dict[str, str], all_parts: list[Part]) -> list[Claim]:
    """All claims, with what the parts measured. `outcomes`: name of a part that ran -> "" or what
    went wrong. A part that was cut may have left figures: they count."""
    found: dict[str, Claim] = {}
    for part in all_parts:
        if part.name in TESTS and part.name in outcomes:
            problem = outcomes[part.name]
            row = Claim(TESTS[part.name], "all pass", problem or "pass", not problem)
            found[row.what] = row
        elif part.name in READERS and part.name in outcomes and Path(part.json).is_file():
            rows = READERS[part.name](json.loads(Path(part.json).read_text()))
            found |= {row.what: row for row in rows}
    rows = [found.pop(claim.what, claim) for claim in CLAIMS]
    return rows + list(found.values())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for the figures")
    parser.add_argument("--minutes", type=float, default=8, help="nothing runs longer than that")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at the smallest size")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("no CUDA device is usable here; --rehearse shows that all of it runs")
    return args


def main() -> int:
    """0 if every part ran; what was measured does not matter."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    out, console = args.out.resolve(), plain_console(width=110)
    all_parts = parts(out, args.rehearse)
    seconds = sum(part.limit for part in all_parts) if args.rehearse else 60 * args.minutes
    end = time.monotonic() + seconds
    outcomes: dict[str, str] = {}
    for part in all_parts:
        left = end - time.monotonic()
        if left > 5:
            outcomes[part.name] = run(part, out, min(left, part.limit), console)
    rows = claims(outcomes, all_parts)
    if args.rehearse:
        rows = [row._replace(measured=TO_MEASURE, holds=None) for row in rows]
    table = Table(title="claims")
    for heading in ("what", "wanted", "measured", ""):
        table.add_column(heading)
    for claim in rows:
        verdict = {None: "", True: "holds", False: "short"}[claim.holds]
        table.add_row(claim.what, claim.wanted, claim.measured, verdict)
    console.print(table)
    about = machine("torch", "triton")
    if torch.cuda.is_available():
        about["processor"] = torch.cuda.get_device_name()
    console.print(in_words(about))
    if args.rehearse:
        console.print("a rehearsal on the CPU: the claims are about GPUs")
    failed = {part.name: outcomes.get(part.name, "no time left") for part in all_parts}
    for name, problem in failed.items():
        if problem:
            console.print(f"{name}: {problem}, see {out / name}.txt")
    return 1 if any(failed.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
