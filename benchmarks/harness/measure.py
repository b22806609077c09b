"""What benchmarks share: the machine in words, rounds that take turns, medians and quartiles."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def processor() -> str:
    """The processor's name as Linux tells it, else Python's word for it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, load and the versions of Python and of `packages`."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    return {
        "processor": processor(),
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
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def number(value: float, digits: int = 3) -> str:
    """So many digits at least, without exponents."""
    return f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"


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


def take_turns(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Items a second of every side, one figure a round. A side does its work and says how many
    items that was. In each round every side has its turn, so that a busy machine slows all."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():  # what is compiled or cached at first use is not timed
        side()
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            items = side()
            rates[name].append(items / (time.perf_counter() - start))
    return rates


def ratios(rates: dict[str, list[float]], name: str, to: str) -> list[float]:
    """Round by round, how many times as fast as `to` it is."""
    return [a / b for a, b in zip(rates[name], rates[to], strict=True)]
