"""Everything that needs a GPU, in one call of under eight minutes: tests, then benchmarks.

    python benchmarks/gpu.py --out figures             # on a machine with a GPU
    python benchmarks/gpu.py --out figures --rehearse  # without one: each part at its smallest

Runs the GPU tests, the step of ours as a CUDA graph, eager and plain, the memory against the plain
step, each kernel, training end to end, decoding by GPU and CPU, and the croppers. Writes what each
prints and its JSON into --out, and ends with a table: what is claimed, and what was measured. Parts
are processes with time limits of their own, most important first, so one that fails or is cut costs
no other.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from ibeton.benchmarks.harness.measure import in_words, machine, quartiles, ratios
from ibeton.command import run_command
from ibeton.progress import plain_console

ROOT = Path(__file__).resolve().parents[1]
REHEARSAL_LIMIT_S = 3600  # of each part; it takes seconds, unless the machine is busy
TO_MEASURE = "to be measured"
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
    """A row of the last table: wanted is `limit` or more, or less if `at_most`. `form` writes what
    was measured; `holds` is None where nothing was."""

    what: str
    wanted: str
    limit: float = 0.0
    form: str = ""
    at_most: bool = False
    measured: str = TO_MEASURE
    holds: bool | None = None

    def of(self, value: float, *more: float) -> "Claim":
        """With what was measured; `more` is for `form` alone."""
        holds = value <= self.limit if self.at_most else value >= self.limit
        return self._replace(measured=self.form.format(value, *more), holds=holds)


CLAIMS = [  # speeds are those of an H100
    Claim("GPU tests of the model", "all pass"),
    Claim("ViT-S, batch 64", "1900 images/s", 1900, "{:,.0f}"),
    Claim("of matrix products", "40%", 0.40, "{:.0%}"),
    Claim("against the plain step", "3.0 x", 3.0, "{:.2f} x"),
    Claim("memory of the plain step", "0.45 of it", 0.45, "{:.2f}", at_most=True),
    Claim("launches, eager", "at most 500", 500, "{:,}", at_most=True),
    Claim("host time of a graph", "5.0 ms", 5.0, "{:.2f} ms", at_most=True),
    Claim("192 x 9, batch 256", "16,800 images/s", 16_800, "{:,.0f}"),
    Claim("end to end", "95 % of the model alone", 0.95, "{:.0%}, {:,.0f} images/s"),
    Claim("step with crops behind it", "10 % longer", 0.10, "{:.1%}", at_most=True),
    Claim("other GPU tests", "all pass"),
]
KNOWN = {claim.what: claim for claim in CLAIMS}
KERNEL = Claim("", "60 % of copy", 60, "{:.0f} %")  # each has its own row, below the others


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
    if part.json:
        Path(part.json).unlink(missing_ok=True)  # of an earlier call
    interpreter = {"TRITON_INTERPRET": "1"} if part.interpreted else {}
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *part.arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **interpreter},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=limit)
        problem = f"exit status {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        end_session(process)
        text, _ = process.communicate()
        problem = f"not done in {limit:.0f} s"
    finally:
        end_session(process)
    (out / f"{part.name}.txt").write_text(text)
    console.print(text[-6000:], markup=False, highlight=False, soft_wrap=True)
    console.print(f"{part.name}: {problem or 'done'}, {time.monotonic() - start:.0f} s")
    return problem


def end_session(process: subprocess.Popen[str]) -> None:
    """Kill the process and its children, so that none runs beside the next part."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def step_claims(figures: dict[str, Any]) -> Iterator[Claim]:
    """Of benchmarks/graph.py. Cases may be missing; a side without memory has no figures."""

    def figure(case: str, side: str, name: str) -> float:
        return figures["cases"].get(case, {}).get(side, {}).get(name, 0)

    if seconds := figure(MODEL, "graph", "seconds"):
        case = figures["cases"][MODEL]
        yield KNOWN["ViT-S, batch 64"].of(case["images"] / seconds)
        yield KNOWN["of matrix products"].of(case["flops"] / seconds / case["peak_flops"])
        if plain := figure(MODEL, "plain", "seconds"):
            yield KNOWN["against the plain step"].of(plain / seconds)
    if launches := figure(MODEL, "eager", "launches"):
        yield KNOWN["launches, eager"].of(launches)
    if host := figure("vit_s:fp16:8", "graph", "host"):
        yield KNOWN["host time of a graph"].of(1e3 * host)
    if seconds := figure(SMALL, "graph", "seconds"):
        yield KNOWN["192 x 9, batch 256"].of(figures["cases"][SMALL]["images"] / seconds)


def memory_claims(figures: dict[str, Any]) -> Iterator[Claim]:
    """Of benchmarks/model.py."""
    used = figures["comparison"]["memory"]
    yield KNOWN["memory of the plain step"].of(used["ours"] / used["baseline"])


def kernel_claims(figures: dict[str, Any]) -> Iterator[Claim]:
    """Of benchmarks/kernels.py: each against a copy of its bytes, but for those that products
    bound."""
    for name, result in figures["kernels"].items():
        if "linear" not in name and "products" not in name:
            times = result["seconds"]
            share = 100 * result["bytes"] * quartiles(ratios(times, "copy", "fused"))[0]
            yield KERNEL._replace(what=name).of(share)


def end_to_end_claims(figures: dict[str, Any]) -> Iterator[Claim]:
    """Of benchmarks/throughput.py: loader and model together against the model alone."""
    both, alone = (quartiles(figures["images_per_s"][name])[0] for name in ("both", "model"))
    yield KNOWN["end to end"].of(both / alone, both)


def crop_claims(figures: dict[str, Any]) -> Iterator[Claim]:
    """The croppers need only be faster than the step that waits for them."""
    times = {name: quartiles(values)[0] for name, values in figures["seconds_a_batch"].items()}
    longer = times["steps from the feed"] / times["step alone"] - 1
    yield KNOWN["step with crops behind it"].of(longer)


READERS = {
    "steps": step_claims,
    "memory": memory_claims,
    "kernels": kernel_claims,
    "end_to_end": end_to_end_claims,
    "crops": crop_claims,
}
TESTS = {"tests_model": "GPU tests of the model", "tests_other": "other GPU tests"}


def claims(outcomes: dict[str, str], all_parts: list[Part]) -> list[Claim]:
    """All claims, with what the parts measured. `outcomes`: name of a part that ran -> "" or what
    went wrong. A part that was cut may have left figures: they count."""
    found: dict[str, Claim] = {}
    for name, path in ((part.name, Path(part.json)) for part in all_parts if part.name in outcomes):
        if name in TESTS:
            measured, holds = outcomes[name] or "pass", not outcomes[name]
            found[TESTS[name]] = KNOWN[TESTS[name]]._replace(measured=measured, holds=holds)
        elif name in READERS and path.is_file():
            found |= {row.what: row for row in READERS[name](json.loads(path.read_text()))}
    return [found.pop(claim.what, claim) for claim in CLAIMS] + list(found.values())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for the figures")
    parser.add_argument(
        "--minutes", type=float, default=8, help="time limit of the whole call, in minutes"
    )
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
    table = Table("what", "wanted", "measured", "", title="claims")
    for claim in rows:
        verdict = {None: "", True: "holds", False: "short"}[claim.holds]
        table.add_row(claim.what, claim.wanted, claim.measured, verdict)
    console.print(table)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console.print(in_words(machine("torch", "triton", device=device)))
    if args.rehearse:
        console.print("a rehearsal on the CPU: the claims are about GPUs")
    failed = {part.name: outcomes.get(part.name, "no time left") for part in all_parts}
    for name, problem in failed.items():
        if problem:
            console.print(f"{name}: {problem}, see {out / name}.txt")
    return 1 if any(failed.values()) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.default_int_handler)  # a closed terminal ends the parts
    sys.exit(run_command(main, writes=False))
