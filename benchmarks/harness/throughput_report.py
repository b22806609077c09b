"""What benchmarks/throughput.py measured: a table, a picture, a page, and against another run."""

import base64
import html
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot as plt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ibeton.benchmarks.harness.measure import in_words, number, quartiles, spread
from ibeton.stages import PARTS
from ibeton.training.timing.speed import WAITING

_STEP, _LOADER, _FLOOR, _WAIT = "#2b6cb0", "#2f855a", "#222222", "#c05621"
_ROUNDS_TO_TELL = 4  # fewer rounds may lie apart by chance
# Legends stand below the axes, where no bar and no line can reach.
_BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
_BELOW |= {"frameon": False, "fontsize": 9}
_RANKS = "milliseconds per step by rank; comm is waiting for others"
HEADINGS = ("stage", "ms per step", "images/s", "% of step", "floor ms", "x floor")


@dataclass(frozen=True)
class Row:
    """A stage: its milliseconds per step by round, on the step's critical path or in the loader
    beside it, where all workers work at once."""

    name: str
    beside: bool
    ms: list[float]
    middle: float  # of `ms`: the step's in its middle round, so that stages add up to it
    share: float | None  # of the step; None for what runs beside it
    floor_ms: float | None
    images: int

    def cells(self) -> list[str]:
        """For the columns of HEADINGS."""
        middle, (_, low, high) = self.middle, quartiles(self.ms)
        ceiling = number(1000 * self.images / middle) if middle else ""
        floor = "" if self.floor_ms is None else number(self.floor_ms)
        times = number(middle / self.floor_ms) if self.floor_ms else ""
        share = "beside" if self.share is None else f"{self.share:.1%}"
        return [self.name, _ranged(middle, low, high), ceiling, share, floor, times]


def rows(result: dict[str, Any]) -> list[Row]:
    """Stages of the loader, then those of the step in the order of a step."""
    images, floor = result["run"]["batch_size"], result["floor_ms"]
    middle = result["middle_round"]
    whole = sum(ms[middle] for ms in result["step_ms"].values())
    found = [
        Row(name, True, stage["ms"], quartiles(stage["ms"])[0], None, floor.get(name), images)
        for name, stage in result["loader_ms"].items()
    ]
    for name, ms in result["step_ms"].items():
        beside = name in result["loader_ms"]  # the floor is then that of the work beside
        lowest = None if beside else floor.get(name)
        found.append(Row(name, False, ms, ms[middle], ms[middle] / whole, lowest, images))
    return found


def conditions(result: dict[str, Any]) -> str:
    """On what it was measured, in one sentence."""
    run, peaks = result["run"], result["peaks"]
    processes = f" rank 0 of {run['processes']};" if run["processes"] > 1 else ""
    return (
        f"{run['arch']} in {run['precision']} on {run['device']}, batch {run['batch_size']},"
        f" {run['loader']} loader with {run['workers']} worker(s), {run['photos']:,} photos;"
        f"{processes} the middle round (quartiles) of {run['rounds']} rounds of {run['steps']}"
        " steps, taken in turns."
        f" Machine's best: {peaks['flops'] / 1e9:.4g} GFLOP/s, {peaks['memory'] / 1e9:.3g} GB/s,"
        f" {peaks['decode']:.4g} JPEGs/s a thread. {in_words(result['machine'])}"
    )


def clock_line(result: dict[str, Any]) -> str:
    """What the clock costs, counted and as the difference of two sides."""
    rates, cost = result["images_per_s"], result["clock"]
    pairs = zip(rates["model, clock off"], rates["model"], strict=True)
    return (
        f"The clock: {cost['us_a_stage']:.2g} us per stage, {cost['share_of_step']:.3%} of a step;"
        f" model without it / with it: {spread([off / on for off, on in pairs])}."
    )


def print_report(result: dict[str, Any], console: Console) -> None:
    """Tables of stages and of sides, then the verdict."""
    console.print("where a step goes: loader stages beside it, then its own")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    before = None
    for row in rows(result):
        if before is not None and before != row.beside:
            table.add_section()
        before = row.beside
        table.add_row(*row.cells())
    table.add_section()
    table.add_row("step", *_step_cells(result))
    console.print(table)
    sides = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    sides.add_column("side")
    sides.add_column("images/s", justify="right")
    for name, rates in result["images_per_s"].items():
        sides.add_row(name, spread(rates))
    console.print(sides)
    if result["ranks"]:
        heads, *body = rank_rows(result["ranks"])
        console.print(_RANKS, soft_wrap=True)
        ranks = Table(*heads, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for cells in body:
            ranks.add_row(*cells)
        console.print(ranks)
    for line in (*result["verdict"], clock_line(result), conditions(result)):
        console.print(line, soft_wrap=True)


def rank_rows(ranks: list[dict[str, float]]) -> list[list[str]]:
    """Milliseconds per step by rank, a row each under one of the parts' names."""
    names = [name for name in PARTS if any(name in parts for parts in ranks)]
    numbers = [[number(parts.get(name, 0.0)) for name in names] for parts in ranks]
    return [["rank", *names], *([str(rank), *row] for rank, row in enumerate(numbers))]


def _step_cells(result: dict[str, Any]) -> list[str]:
    rates = result["images_per_s"]["both"]
    ms = [1000 * result["run"]["batch_size"] / rate for rate in rates]
    middle, (_, low, high) = result["middle_round"], quartiles(ms)
    return [_ranged(ms[middle], low, high), number(rates[middle]), "100%", "", ""]


def _ranged(middle: float, low: float, high: float) -> str:
    """Milliseconds (quartiles), in few characters: a stage below a microsecond is 0.001."""
    return "{} ({} - {})".format(*(_ms(value) for value in (middle, low, high)))


def _ms(value: float) -> str:
    return number(value) if value >= 0.1 else f"{value:.3f}"


def write_png(result: dict[str, Any], path: Path) -> Path:
    """Bars of the stages with their floors; beside them the sides, round by round."""
    found = rows(result)[::-1]
    height = 0.34 * len(found) + 1.8
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, height), width_ratios=(3, 2), layout="constrained"
    )
    for place, row in enumerate(found):
        middle, (_, low, high) = row.middle, quartiles(row.ms)
        color = _LOADER if row.beside else _WAIT if row.name in WAITING else _STEP
        left.barh(place, middle, color=color, height=0.7)
        left.plot([low, high], [place, place], color="#999999", linewidth=2)
        left.annotate(number(middle), (max(middle, high), place), (5, 0), va="center",
                      textcoords="offset points", fontsize=9)  # fmt: skip
        if row.floor_ms:
            left.plot([row.floor_ms] * 2, [place - 0.42, place + 0.42], color=_FLOOR, linewidth=2.5)
    left.set_yticks(
        range(len(found)), [f"{r.name}{' (loader)' if r.beside else ''}" for r in found]
    )
    left.set_xlim(0, 1.15 * max(max(row.middle, quartiles(row.ms)[2]) for row in found))
    left.set(xlabel="milliseconds per step", title="stages")
    legend = {"loader, beside the step": _LOADER, "step: waits": _WAIT, "step: model": _STEP}
    handles: list[Any] = [plt.Rectangle((0, 0), 1, 1, color=color) for color in legend.values()]
    handles.append(plt.Line2D([], [], color=_FLOOR, linewidth=2.5))
    left.legend(handles, [*legend, "floor"], **_BELOW)
    _draw_sides(right, result["images_per_s"])
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, axis="x" if axis is left else "y")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw_sides(axis: Any, sides: dict[str, list[float]]) -> None:
    """A line a side over the rounds, on a logarithmic scale: a loader may be far above a model."""
    for name, rates in sides.items():
        if name == "model, clock off":  # the model's line again
            continue
        label = f"{name}: {number(quartiles(rates)[0])}"
        axis.plot(range(1, len(rates) + 1), rates, marker="o", label=label)
    axis.set_yscale("log")
    axis.set_xticks(range(1, max(map(len, sides.values())) + 1))
    every = [rate for rates in sides.values() for rate in rates]
    axis.set_ylim(10 ** math.floor(math.log10(min(every))), 10 ** math.ceil(math.log10(max(every))))
    axis.set(xlabel="round", ylabel="images/s (logarithmic)", title="loader, model, and both")
    axis.legend(**_BELOW)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } img { max-width: 100%; }
td, th { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; } tr.beside { color: #2f855a; }
div.wide { overflow-x: auto; }
p.verdict { font-size: 1.1rem; } p.small { color: #555; font-size: .85rem; }
"""


def write_html(result: dict[str, Any], picture: Path, path: Path) -> Path:
    """One file that needs no other: verdict, picture, tables, settings."""
    image = base64.b64encode(picture.read_bytes()).decode()
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in HEADINGS)
    body = "".join(
        f'<tr class="{"beside" if row.beside else ""}">{_tds(row.cells())}</tr>'
        for row in rows(result)
    )
    body += f"<tr><td><b>step</b></td>{_tds(_step_cells(result))}</tr>"
    sides = "".join(
        f"<tr>{_tds([name, spread(rates)])}</tr>" for name, rates in result["images_per_s"].items()
    )
    verdict = "".join(f'<p class="verdict">{html.escape(line)}</p>' for line in result["verdict"])
    settings = html.escape(json.dumps(result["settings"], indent=1))
    path.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>ibeton throughput</title>'
        f"<style>{_STYLE}</style><h1>Where a step goes</h1>{verdict}"
        f'<img alt="stages and sides" src="data:image/png;base64,{image}">'
        f'<h2>Stages</h2><div class="wide"><table><tr>{head}</tr>{body}</table></div>'
        "<p>Loader stages (green) run beside the step, in threads, processes or on a stream of"
        " their own: milliseconds per step with all of them busy, measured with the loader alone."
        " images/s is the ceiling that a stage sets by itself.</p>"
        '<h2>Sides</h2><div class="wide"><table><tr><th>side</th><th>images/s</th></tr>'
        f"{sides}</table></div>{_ranks_html(result['ranks'])}<p>{html.escape(clock_line(result))}</p>"
        f'<p class="small">{html.escape(conditions(result))}</p>'
        f"<details><summary>Settings</summary><pre>{settings}</pre></details></html>",
        encoding="utf-8",
    )
    return path


def _ranks_html(ranks: list[dict[str, float]]) -> str:
    table = "".join(f"<tr>{_tds(row)}</tr>" for row in rank_rows(ranks))
    wide = f'<div class="wide"><table>{table}</table></div>'
    return f"<h2>Ranks</h2><p>{_RANKS}.</p>{wide}" if ranks else ""


def _tds(cells: list[str]) -> str:
    return "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)


def compare(first: Path, second: Path, console: Console) -> list[str]:
    """Show what of two JSON files differs beyond noise: where every round of one lies above every
    round of the other. Returns the names of these. Raises FileNotFoundError and ValueError."""
    before, after = _load(first), _load(second)
    console.print(f"before: {first}", soft_wrap=True)
    console.print(f"after:  {second}", soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("", "before", "after", "after / before", ""):
        table.add_column(heading, justify="right" if heading else "left")
    changed = []
    for name, old in before.items():
        if (new := after.get(name)) is None:
            continue
        apart = min(new) > max(old) or max(new) < min(old)
        apart = apart and min(len(old), len(new)) >= _ROUNDS_TO_TELL
        if apart:
            changed.append(name)
        middle = quartiles(old)[0]
        ratio = f"{quartiles(new)[0] / middle:.3f}" if middle else ""
        table.add_row(name, spread(old), spread(new), ratio, "changed" if apart else "")
    console.print(table)
    console.print(
        f"Beyond noise: {', '.join(changed) or 'nothing'}. That is said where all rounds before lie"
        f" apart from all rounds after, of which there must be {_ROUNDS_TO_TELL} or more each."
    )
    return changed


def _load(path: Path) -> dict[str, list[float]]:
    """All measured series of a JSON file, by a name with its unit."""
    if not path.is_file():
        raise FileNotFoundError(f"--compare: {path} does not exist")
    try:
        result = json.loads(path.read_text())
        series = {f"{name}, images/s": rates for name, rates in result["images_per_s"].items()}
        series |= {f"loader {n}, ms": stage["ms"] for n, stage in result["loader_ms"].items()}
        return series | {f"{name}, ms": ms for name, ms in result["step_ms"].items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--compare: {path} is not what benchmarks/throughput.py writes"
        ) from error
