"""What benchmarks share: their options, the machine in words, rounds that take turns, medians and
quartiles, and how results are shown and kept."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ibeton.options import check_output_file
from ibeton.workers import end_with_parent

Result = TypeVar("Result")


def integer(least: int) -> Callable[[str], int]:
    """An argument's type: an integer of at least `least`."""

    def parse(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return number

    parse.__name__ = "integer"  # in argparse's own errors
    return parse


def make_parser(doc: str | None, rounds: int = 5, least: int = 2) -> argparse.ArgumentParser:
    """The options of every benchmark: --rounds, `least` or more (no such option if `rounds` is 0),
    and --json. `doc`: of its module."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    if rounds:
        kind = integer(least)
        parser.add_argument("--rounds", type=kind, default=rounds, help="rounds of each side")
    parser.add_argument("--json", type=json_file, help="write all figures to this file")
    return parser


def json_file(text: str) -> Path:
    """An argument's type: a JSON file that can be written. One that is there is replaced."""
    path = Path(text).expanduser()
    try:
        empty = not path.exists() or path.stat().st_size == 0
        check_output_file("--json", path, ".json", begins=b"" if empty else b"{")
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--json ")) from None
    return path


def processor() -> str:
    """The processor's name as Linux tells it, else Python's word for it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(*packages: str, device: str = "cpu") -> dict[str, Any]:
    """Processor (of a CUDA device: the GPU), cores, load and the versions of Python and of
    `packages`."""
    name = processor()
    if device.startswith("cuda"):
        import torch  # only here: takes seconds

        name = torch.cuda.get_device_name(device)
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **versions,
    }


def in_words(about: dict[str, Any]) -> str:
    """One line of `machine`."""
    packages = ", ".join(
        f"{k} {v}" for k, v in about.items() if k not in ("processor", "cores", "load")
    )
    return f"{about['processor']}, {about['cores']} cores, load {about['load']}; {packages}"


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    middle, low, high = np.quantile(values, (0.5, 0.25, 0.75)).tolist()
    return middle, low, high


def number(value: float, digits: int = 3) -> str:
    """At least `digits` significant digits, never in exponent notation."""
    if value >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return np.format_float_positional(value, digits, unique=False, fractional=False, trim="-")


def spread(values: list[float], digits: int = 3) -> str:
    """Median (quartiles), for a table."""
    middle, low, high = (number(value, digits) for value in quartiles(values))
    return f"{middle} ({low} - {high})"


def figures(first: str, *headings: str, title: str | None = None) -> Table:
    """A table of figures: the first column to the left, the others to the right."""
    table = Table(first, title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def in_turns(sides: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """What every side returns, once per round, after a round that is left out: what is compiled or
    cached at first use does not count. In each round every side has its turn, so that a busy
    machine slows all, and another side begins, so that none always follows the same."""
    results: dict[str, list[Result]] = {name: [] for name in sides}
    names = list(sides)
    for i in range(rounds + 1):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            result = sides[name]()
            if i:
                results[name].append(result)
    return results


def take_turns(
    sides: dict[str, Callable[[], int]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Items per second of every side, `in_turns`. A side does its work and says how many items that
    was."""

    def rate(side: Callable[[], int]) -> float:
        start = clock()
        items = side()
        return items / (clock() - start)

    return in_turns({name: partial(rate, side) for name, side in sides.items()}, rounds)


def on_two_clocks(
    sides: dict[str, Callable[[], int]],
    rounds: int,
    cpu_clock: Callable[[], float] = time.process_time,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """`take_turns`, and CPU milliseconds per item of all threads, one figure per round."""
    cpu: dict[str, list[float]] = {name: [] for name in sides}

    def timed(name: str) -> int:
        start = cpu_clock()
        done = sides[name]()
        cpu[name].append(1e3 * (cpu_clock() - start) / done)
        return done

    rates = take_turns({name: partial(timed, name) for name in sides}, rounds)
    return rates, {name: spent[1:] for name, spent in cpu.items()}  # the first is not timed


def apart(function: Callable[..., Result], *arguments: Any) -> Result:
    """What it returns in a new process, with thread pools and memory of its own."""
    with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as process:
        return process.submit(function, *arguments).result()


def ratios(rates: dict[str, list[float]], name: str, to: str) -> list[float]:
    """Round by round, how many times as fast as `to` it is."""
    return [a / b for a, b in zip(rates[name], rates[to], strict=True)]


@contextmanager
def counting_kept(weights: bool = True) -> Iterator[Callable[[], int]]:
    """Yield a function that gives the bytes that operations inside keep for the backward, each
    storage once; `weights`: parameters too."""
    import torch

    kept: dict[int, Any] = {}  # alive, or another could take the address of one that was counted

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if weights or not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in kept.values())


def conclude(
    console: Console, about: dict[str, Any], rounds: int, path: Path | None, **results: Any
) -> None:
    """Say on which machine and how often it was measured (0: not in rounds); write `results` to
    `path` as JSON."""
    turns = f"; medians (quartiles) of {rounds} rounds, taken in turns" if rounds else ""
    console.print(in_words(about) + turns)
    if path is not None:
        path.write_text(json.dumps({"machine": about, **results}, indent=1))
