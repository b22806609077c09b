"""All figures of a backbone on one page, beside the published ones of its architecture.

    ibeton report runs/vit_s runs/finetune-vit_s --output report.md

reads the JSON files that every evaluation writes, from run folders or given one by one, and writes
report.md and report.html, with the PNG pictures that lie in the folders.
"""

import base64
import html
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ibeton.atomic import write_text
from ibeton.command import run_command
from ibeton.evaluation.published import FIGURES, published
from ibeton.options import Parser, check_output_file

_TITLE = "# Evaluation"
_PAGE = "<!doctype html><html lang=en><meta charset=utf-8><title>Evaluation</title>"
_HEADINGS = ("task", "network", "measured", "published", "photos", "file")
_ALL = ("protocol", "score", "network", "measured", "published", "photos")
_EXPLANATION = (
    "Measured figures beside those that the iBOT paper publishes for the same architecture,"
    " pre-trained and evaluated on full data sets (top-1 in percent where nothing else is said)."
    " Figures of other data, or of shorter runs, are not comparable with them. An empty cell means"
    " that no published figure of this kind is known."
)
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;"
    "text-align:left}td.n{text-align:right}img{max-width:100%}figure{margin:1.5em 0}"
)


@dataclass(frozen=True)
class Score:
    """One figure: where it was measured, on which network, under which names."""

    protocol: str
    name: str
    network: str
    value: float
    photos: str  # that it was measured on, "" where the file does not say
    path: Path


@dataclass
class Backbone:
    """Everything found about the backbone of one checkpoint."""

    checkpoint: str
    arch: str
    scores: list[Score] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def find(paths: Sequence[Path]) -> tuple[list[Backbone], list[Path]]:
    """The backbones that JSON files of evaluations tell of, and PNG pictures; `paths` are files or
    run folders. Raises FileNotFoundError or ValueError, naming the path, where there is nothing."""
    backbones: dict[str, Backbone] = {}
    pictures: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: give run folders or JSON files")
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        found = [(file, report) for file in files if (report := _read(file, path.is_file()))]
        if not found:
            raise ValueError(f"{path} holds no scores yet: run an evaluation first")
        if path.is_dir():
            pictures += sorted(path.glob("*.png")) + sorted(path.glob("pictures/*.png"))
        for file, report in found:
            name, arch = str(report["checkpoint"]), str(report.get("arch", "unknown"))
            backbone = backbones.setdefault(os.path.abspath(name), Backbone(name, arch))
            backbone.checkpoint = min(backbone.checkpoint, name, key=len)
            if backbone.arch == "unknown":  # a dense run of an earlier version does not say it
                backbone.arch = arch
            backbone.left_out |= report.get("left_out", {})
            backbone.scores += _scores(report, file)
    return list(backbones.values()), pictures


def _read(path: Path, asked: bool) -> dict[str, Any]:
    """The report in a JSON file; empty for another file, which raises ValueError where `asked`."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        if not asked:
            return {}
        raise ValueError(f"{path} is not a valid JSON file ({error})") from error
    fits = isinstance(content, dict) and isinstance(content.get("scores"), dict)
    if fits and isinstance(content.get("settings"), dict):
        content = _dense(content)
    if fits and "checkpoint" in content:
        return content
    if asked:
        raise ValueError(f"{path} holds no scores of an evaluation: it lacks checkpoint or scores")
    return {}


def _dense(content: dict[str, Any]) -> dict[str, Any]:
    """The scores.json of segmentation or detection, in the form of the other evaluations."""
    settings, scores = content["settings"], content["scores"]
    task = "detect" if "box_ap" in scores else "segment"
    if task == "segment" and settings.get("head", "upernet") != "upernet":
        task = f"segment_{settings['head']}"
    network = "untrained" if settings.get("untrained") else settings.get("network", "teacher")
    return content | settings | {"left_out": {}, "scores": {network: {task: scores}}}


def _scores(report: dict[str, Any], path: Path) -> list[Score]:
    photos = Path(str(report.get("val") or report.get("data") or "")).name
    return [
        Score(protocol, name, network, value, photos, path)
        for network, protocols in report["scores"].items()
        for protocol, scores in protocols.items()
        for name, value in scores.items()
        if isinstance(value, int | float)
    ]


def content(
    backbones: Sequence[Backbone], pictures: Sequence[Path], whole: bool = True
) -> Iterator[tuple[str, Any]]:
    """The page in order: "h1", "h2", "h3" and "p" with their text, "table" with its rows, headings
    first, and "picture" with its path. Without `whole` no scores but those with a published
    figure."""
    yield "h1", "Evaluation"
    yield "p", _EXPLANATION
    for backbone in backbones:
        yield "h2", f"{backbone.arch}: {backbone.checkpoint}"
        known, every = [_HEADINGS], [_ALL]
        for s in backbone.scores:
            beside = published(s.protocol, s.name, backbone.arch)
            text = f"{s.value:,}" if isinstance(s.value, int) else f"{s.value:.4g}"
            every.append((s.protocol, s.name, s.network, text, beside, s.photos))
            if figure := FIGURES.get((s.protocol, s.name)):
                cells = (s.network, f"{s.value:.2f}", beside, s.photos, str(s.path))
                known.append((figure[0], *cells))
        if len(known) > 1:
            yield "table", known
        if not whole:
            continue
        yield "h3", "All scores"
        yield "table", every
        for name, why in backbone.left_out.items():
            yield "p", f"left out: {name}: {why}"
    if pictures:
        yield "h2", "Pictures"
    for path in pictures:
        yield "picture", path


def markdown(parts: Iterator[tuple[str, Any]], beside: Path) -> str:
    """What `content` gives in Markdown, with paths of pictures relative to the folder `beside`."""
    marks = {"h1": "# ", "h2": "## ", "h3": "### ", "p": ""}
    lines: list[str] = []
    for kind, what in parts:
        if kind == "table":
            rows = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in what]
            lines += [f"| {rows[0]} |", "| --- " * len(what[0]) + "|"]
            lines += [f"| {row} |" for row in rows[1:]]
        elif kind == "picture":
            link = quote(os.path.relpath(what, beside))
            lines += [f"![{what.name}]({link})", f"*{what}*"]
        else:
            lines.append(marks[kind] + what)
        lines.append("")
    return "\n".join(lines)


def page(backbones: Sequence[Backbone], pictures: Sequence[Path]) -> str:
    """The page in HTML, one self-contained file."""
    parts = [_PAGE, f"<style>{_STYLE}</style>"]
    for kind, what in content(backbones, pictures):
        if kind == "table":
            rows = [_html_row(row, "td" if number else "th") for number, row in enumerate(what)]
            parts.append(f"<table>{''.join(rows)}</table>")
        elif kind == "picture":
            data = base64.b64encode(what.read_bytes()).decode()
            caption = html.escape(str(what))
            parts.append(
                f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        else:
            parts.append(f"<{kind}>{html.escape(what)}</{kind}>")
    return "\n".join(parts) + "\n</html>\n"


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def main(argv: Sequence[str] | None = None) -> int:
    """0; 2 where there is nothing to report, with a sentence."""
    parser = Parser(
        prog="python -m evaluation.report", description="All figures of a backbone on one page."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or JSON files of scores")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.md"),
        help="Markdown file to write; the HTML page goes beside it (default: report.md)",
    )
    args = parser.parse_args(argv)

    def make() -> int:
        page_path = args.output.with_suffix(".html")
        for path, suffix, begins in ((args.output, ".md", _TITLE), (page_path, ".html", _PAGE)):
            if path.suffix != suffix or path.exists():
                check_output_file("--output", path, suffix, begins.encode())
        backbones, pictures = find(args.runs)
        text = markdown(content(backbones, pictures), args.output.parent)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.output, text)
        write_text(page_path, page(backbones, pictures))
        print(markdown(content(backbones, [], whole=False), args.output.parent).rstrip())
        print(f"\n{args.output} and {page_path} written")
        return 0

    return run_command(make)


if __name__ == "__main__":
    raise SystemExit(main())
