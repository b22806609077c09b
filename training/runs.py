"""Lists and compares runs.

    ibeton runs [FOLDER]                    a line per run folder in FOLDER (default: runs)
    ibeton runs compare A B [--png FILE]    settings that differ, curves over each other

A line has the architecture, epochs done, last loss, last k-NN top-1 in percent, images/s and state.
A run that says it is running although no process holds its folder was killed.
"""

import json
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from ibeton.command import run_command
from ibeton.options import Parser, check_output_file, flag
from ibeton.training.log.curves import draw_curves, run_names
from ibeton.training.run_folder import CONFIG, RUN, is_held, read_config, read_run

_PNG = b"\x89PNG"  # how a picture begins
_HEADS = ("run", "arch", "epochs", "loss", "k-NN", "images/s", "state", "since")


def main(arguments: list[str] | None = None) -> int:
    """0; 2 where there is no run, with a sentence."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["compare"]:
        parser = Parser(prog="python -m training.runs compare", description="Compare two runs.")
        parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="run folder")
        parser.add_argument("--png", type=Path, default=Path("compare.png"), help="to write")
        args = parser.parse_args(given[1:])
        first, second = args.runs
        return run_command(lambda: compare(first, second, args.png), writes=False)
    parser = Parser(
        prog="python -m training.runs",
        description="List runs and their state. `ibeton runs compare A B` compares two.",
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), help="of runs, or of one run"
    )
    folder = Path(parser.parse_args(given).folder)
    return run_command(lambda: list_runs(folder), writes=False)


def list_runs(folder: Path) -> int:
    """Print a line per run folder in `folder`, and why a damaged one cannot be read; returns 0."""
    rows: list[tuple[str, ...]] = [_HEADS]
    damaged = []
    for run in run_folders(folder):
        try:
            rows.append(_row(run))
        except (ValueError, KeyError, OSError) as error:  # one does not hide the others
            rows.append((run.name, *["-"] * 5, "unreadable", "-"))
            damaged.append(f"unreadable: {error}")
    print_table(rows)
    for line in damaged:
        print(line)
    return 0


def compare(first: Path, second: Path, png: Path) -> int:
    """Print the settings and last figures that differ between two runs, and draw their curves over
    each other in `png`; returns 0. Raises FileNotFoundError for what is no run folder."""
    check_output_file("--png", png, ".png", _PNG)
    for folder in (first, second):
        if not (folder / CONFIG).exists():
            raise FileNotFoundError(f"{folder} is no run folder: it has no {CONFIG}")
    configs = [read_config(folder) for folder in (first, second)]
    rows = [
        (flag(name), *(_setting(config, name) for config in configs))
        for name in configs[0] | configs[1]
        if name not in ("output_dir", "resume") and configs[0].get(name) != configs[1].get(name)
    ]
    figures = zip(_HEADS[2:6], _row(first)[2:6], _row(second)[2:6], strict=True)
    print_table([("", *run_names([first, second])), *rows, *figures])
    picture = draw_curves([first, second], png)
    print(f"curves: {picture}" if picture else "no curves: neither run has logged a step")
    return 0


def _setting(config: dict[str, Any], name: str) -> str:
    value = config.get(name, "-")
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def run_folders(folder: Path) -> list[Path]:
    """Run folders in `folder`, by name, or `folder` itself. Raises FileNotFoundError if there is
    none."""
    if _is_run(folder):
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG}") if _is_run(path.parent))
    if not found:
        raise FileNotFoundError(f"{folder} holds no runs: give a folder of --output-dir folders")
    return found


def _is_run(folder: Path) -> bool:
    """Whether it is the folder of a run; exports of backbones have a config.json, too."""
    return (folder / CONFIG).exists() and any((folder / n).exists() for n in (RUN, "log.jsonl"))


def summary(folder: Path) -> dict[str, Any]:
    """The progress of a run: "arch", "done" of "epochs", the last "loss", "images_per_s" and
    "knn_top1" (None if it has none), "state" and "since"."""
    config, run = read_config(folder), read_run(folder)
    state = run.get("state", "?")
    if state == "running" and not is_held(folder):
        state = "killed"
    found: dict[str, Any] = dict.fromkeys(("step", "loss", "images_per_s", "knn_top1"))
    if (path := folder / "log.jsonl").exists():
        log = path.read_bytes()
        found |= _last(log, b'"loss": ', "step", "loss", "images_per_s")
        found |= _last(log, b'"knn_top1": ', "knn_top1")
    starts = run.get("starts")
    steps = 0 if found["step"] is None else found["step"] + 1
    return {
        **found,
        "done": steps / starts[-1]["steps_per_epoch"] if starts else None,
        **{"arch": config.get("arch"), "epochs": config.get("epochs"), "state": state},
        "since": run.get("since", ""),
    }


def _last(log: bytes, holds: bytes, *names: str) -> dict[str, Any]:
    """`names` of the last whole record with `holds`."""
    whole = log[: log.rfind(b"\n") + 1]
    found = whole.rfind(holds)
    if found < 0:
        return {}
    record = json.loads(whole[whole.rfind(b"\n", 0, found) + 1 : whole.index(b"\n", found)])
    return {name: record.get(name) for name in names}


def _row(folder: Path) -> tuple[str, ...]:
    run = summary(folder)

    def number(name: str, form: str) -> str:
        return "-" if run[name] is None else format(run[name], form)

    return (
        folder.name,
        str(run["arch"]),
        f"{number('done', '.1f')}/{run['epochs']}",
        number("loss", ".3f"),
        number("knn_top1", ".2f"),
        number("images_per_s", ".1f"),
        run["state"],
        _ago(run["since"]),
    )


def _ago(since: str) -> str:
    """How long ago a time of run.json was, in the largest unit."""
    if not since:
        return "-"
    seconds = time.time() - datetime.strptime(since, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Rows in plain columns, which may go to a file."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    raise SystemExit(main())
