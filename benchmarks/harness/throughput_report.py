"""What benchmarks/throughput.py measured: a table, a picture, a page, and against another run."""

import base64
import html
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ibeton.benchmarks.harness.measure import figures, in_words, number, quartiles
from ibeton.command import amount
from ibeton.progress import plain_console
from ibeton.stages import PARTS
from ibeton.training.timing.speed import WAITING

_STEP, _LOADER, _FLOOR, _WAIT = "#2b6cb0", "#2f855a", "#222222", "#c05621"
_ROUNDS_TO_TELL = 4  # fewer rounds may lie apart by chance
# Legends stand below the axes, where no bar and no line can reach.
_BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
_BELOW |= {"frameon": False, "fontsize": 9}


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

    def cells(self, images: int) -> list[str]:
        """Stage, milliseconds (quartiles), images/s, share of the step, floor, times the floor."""
        times = _narrow(self.ms, self.middle)
        ceiling = number(1000 * images / self.middle) if self.middle else ""
        share = "beside" if self.share is None else f"{self.share:.1%}"
        floor = [self.floor_ms, self.middle / self.floor_ms] if self.floor_ms else []
        return [self.name, times, ceiling, share, *map(number, floor)]


def _narrow(values: list[float], middle: float | None = None) -> str:
    """`middle`, or the median, and the quartiles in few characters: below 0.001 is 0.000."""
    median, low, high = quartiles(values)
    shown = (median if middle is None else middle, low, high)
    return "{} ({}-{})".format(*(number(v) if v >= 0.1 else f"{v:.3f}" for v in shown))


def rows(result: dict[str, Any]) -> list[Row]:
    """Stages of the loader, then those of the step in the order of a step."""
    middle, floor, beside = result["middle_round"], result["floor_ms"], result["loader_ms"]
    whole = sum(ms[middle] for ms in result["step_ms"].values())
    found = [
        Row(name, True, stage["ms"], quartiles(stage["ms"])[0], None, floor.get(name))
        for name, stage in beside.items()
    ]
    for name, ms in result["step_ms"].items():
        lowest = None if name in beside else floor.get(name)  # that of the work beside
        found.append(Row(name, False, ms, ms[middle], ms[middle] / whole, lowest))
    return found


def conditions(result: dict[str, Any]) -> list[str]:
    """What the clock cost, and on what it was measured."""
    run, peaks, clock = result["run"], result["peaks"], result["clock"]
    processes = f" rank 0 of {run['processes']};" if run["processes"] > 1 else ""
    return [
        f"The clock: {clock['us_per_stage']:.2g} us per stage, {clock['share_of_step']:.3%} of a"
        " step.",
        f"{run['arch']} in {run['precision']} on {run['device']}, batch {run['batch_size']},"
        f" {run['loader']} loader with {amount(run['workers'], 'worker')},"
        f" {run['photos']:,} photos;{processes} the middle round (quartiles) of {run['rounds']}"
        f" rounds of {run['steps']} steps, taken in turns."
        f" Machine's best: {peaks['flops'] / 1e9:.4g} GFLOP/s, {peaks['memory'] / 1e9:.3g} GB/s,"
        f" {peaks['decode']:.4g} JPEGs/s per thread. {in_words(result['machine'])}",
    ]


def print_tables(result: dict[str, Any], console: Console) -> None:
    """Tables of stages, of sides and of ranks."""
    images, middle = result["run"]["batch_size"], result["middle_round"]
    console.print("where a step goes: loader stages beside it, then its own")
    table = figures("stage", "ms per step", "images/s", "% of step", "floor ms", "x floor")
    for beside in (True, False):
        for row in (row for row in rows(result) if row.beside == beside):
            table.add_row(*row.cells(images))
        table.add_section()
    step_ms = [1000 * images / rate for rate in result["images_per_s"]["both"]]
    table.add_row(*Row("step", False, step_ms, step_ms[middle], 1.0, None).cells(images))
    console.print(table)
    sides = figures("side", "images/s")
    for name, rates in result["images_per_s"].items():
        sides.add_row(name, _narrow(rates))
    console.print(sides)
    if ranks := result["ranks"]:
        console.print("milliseconds per step by rank; comm is waiting for others")
        names = [name for name in PARTS if any(name in parts for parts in ranks)]
        table = figures("rank", *names)
        for rank, parts in enumerate(ranks):
            table.add_row(str(rank), *(number(parts.get(name, 0.0)) for name in names))
        console.print(table)


def print_report(result: dict[str, Any], console: Console) -> None:
    """Tables, verdict, and what they rest on."""
    print_tables(result, console)
    for line in (*result["verdict"], *conditions(result)):
        console.print(line, soft_wrap=True)


def write_png(result: dict[str, Any], path: Path) -> Path:
    """Bars of the stages with their floors; beside them the sides, round by round."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    found = rows(result)[::-1]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 0.34 * len(found) + 1.8), width_ratios=(3, 2), layout="constrained"
    )
    for place, row in enumerate(found):
        _, low, high = quartiles(row.ms)
        color = _LOADER if row.beside else _WAIT if row.name in WAITING else _STEP
        left.barh(place, row.middle, color=color, height=0.7)
        left.plot([low, high], [place, place], color="#999999", linewidth=2)
        left.annotate(number(row.middle), (max(row.middle, high), place), (5, 0), va="center",
                      textcoords="offset points", fontsize=9)  # fmt: skip
        if row.floor_ms:
            left.plot([row.floor_ms] * 2, [place - 0.42, place + 0.42], color=_FLOOR, linewidth=2.5)
    names = [f"{row.name}{' (loader)' if row.beside else ''}" for row in found]
    left.set_yticks(range(len(found)), names)
    left.set_xlim(0, 1.15 * max(max(row.middle, *row.ms) for row in found))
    left.set(xlabel="milliseconds per step", title="stages")
    legend = {"loader, beside the step": _LOADER, "step: waits": _WAIT, "step: model": _STEP}
    handles: list[Any] = [plt.Rectangle((0, 0), 1, 1, color=color) for color in legend.values()]
    handles.append(plt.Line2D([], [], color=_FLOOR, linewidth=2.5))
    left.legend(handles, [*legend, "floor"], **_BELOW)
    for name, rates in result["images_per_s"].items():
        label = f"{name}: {number(quartiles(rates)[0])}"
        right.plot(range(1, len(rates) + 1), rates, marker="o", label=label)
    # Logarithmic, as a loader may be far above a model
    every = [math.log10(rate) for rates in result["images_per_s"].values() for rate in rates]
    right.set(yscale="log", ylim=(10 ** math.floor(min(every)), 10 ** math.ceil(max(every))))
    right.set_xticks(range(1, result["run"]["rounds"] + 1))
    right.set(xlabel="round", ylabel="images/s (logarithmic)", title="loader, model, and both")
    right.legend(**_BELOW)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, axis="x" if axis is left else "y")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>ibeton throughput</title>
<style>body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
padding: 0 1rem; }} img {{ max-width: 100%; }} pre {{ overflow-x: auto; line-height: 1.2; }}
p {{ font-size: 1.1rem; }} small {{ color: #555; }}</style>
<h1>Where a step goes</h1>{verdict}<img alt="stages and sides" src="data:image/png;base64,{image}">
<pre>{tables}</pre><small>{conditions}</small><details><summary>Settings</summary><pre>{settings}</pre></details></html>
"""


def write_html(result: dict[str, Any], picture: Path, path: Path) -> Path:
    """One file that needs no other: verdict, picture, tables, settings."""
    text = io.StringIO()
    print_tables(result, plain_console(file=text, width=100))
    parts = {
        "verdict": "".join(f"<p>{html.escape(line)}</p>" for line in result["verdict"]),
        "image": base64.b64encode(picture.read_bytes()).decode(),
        "tables": html.escape(text.getvalue()),
        "conditions": html.escape(" ".join(conditions(result))),
        "settings": html.escape(json.dumps(result["settings"], indent=1)),
    }
    path.write_text(_PAGE.format(**parts), encoding="utf-8")
    return path


def compare(first: Path, second: Path, console: Console) -> list[str]:
    """Show what of two JSON files differs beyond noise: where every round of one lies above every
    round of the other. Returns the names of these. Raises FileNotFoundError and ValueError."""
    before, after = _load(first), _load(second)
    console.print(f"before: {first}\nafter:  {second}", soft_wrap=True)
    changed = []
    for unit, series in before.items():
        table = figures(unit, "before", "after", "ratio")
        for name in {**series, **after[unit]}:
            old, new = series.get(name), after[unit].get(name)
            if old is None or new is None:
                only = "only after" if old is None else "only before"
                table.add_row(name, *(_narrow(v) if v else "" for v in (old, new)), only)
                continue
            told = min(len(old), len(new)) >= _ROUNDS_TO_TELL
            apart = told and (min(new) > max(old) or max(new) < min(old))
            if apart:
                changed.append(f"{name}, {unit}")
            middle = quartiles(old)[0]
            ratio = f"{quartiles(new)[0] / middle:.3f}" if middle else ""
            verdict = f"changed {ratio}" if apart else ratio
            table.add_row(name, _narrow(old), _narrow(new), verdict)
        console.print(table)
    console.print(
        f"Beyond noise: {', '.join(changed) or 'nothing'}. That is said where all rounds before lie"
        f" apart from all rounds after, of which there must be {_ROUNDS_TO_TELL} or more each."
    )
    return changed


def _load(path: Path) -> dict[str, dict[str, list[float]]]:
    """All measured series of a JSON file: unit -> name -> one value per round."""
    if not path.is_file():
        raise FileNotFoundError(f"--compare: {path} does not exist")
    try:
        result = json.loads(path.read_text())
        loader = {f"loader {name}": stage["ms"] for name, stage in result["loader_ms"].items()}
        return {"images/s": dict(result["images_per_s"]), "ms per step": loader | result["step_ms"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        sentence = f"--compare: {path} is not what benchmarks/throughput.py writes"
        raise ValueError(sentence) from error
