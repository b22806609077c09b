"""What all protocols share: options, features of both sets, and how scores are shown and kept.

A protocol is a function from a `Task` to named scores. Its command prints a table, the headlines as
Markdown if they fit the terminal, and writes JSON beside the checkpoint. Under torchrun all ranks
compute features together; rank 0 does the rest.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table
from torch import nn

from ibeton.atomic import write_text
from ibeton.command import run_or_exit
from ibeton.distributed import join_processes, leave_group, rank_and_size
from ibeton.evaluation.frozen.cache import cached_features
from ibeton.evaluation.frozen.features import Extraction, Features
from ibeton.evaluation.networks import load_with_head, untrained, view_size
from ibeton.evaluation.photos import PhotoSet, check_classes, note_if_same
from ibeton.evaluation.trainable import precision_on
from ibeton.model.head import IBOTHead
from ibeton.options import Parser, check_output_file, flag
from ibeton.progress import plain_console
from ibeton.training.config import PRECISIONS

Scores = dict[str, float]
Columns = dict[str, dict[str, Scores]]  # network -> protocol -> scores
# How names of scores end, by unit
_COUNTS = ("labels", "clusters", "epoch")
_SETTINGS = ("lr", "strength")
REPORT = b'{\n "checkpoint": '  # how a file of scores begins
# Settings that may differ where a file is replaced; the precision follows the device.
_MAY_DIFFER = {"checkpoint", "arch", "precision"}
# Options that do not change what is measured, beside the number of networks
_FREE = {"json", "cache", "workers", "batch_size", "device", "save_head", "untrained"}


@dataclass
class Task:
    """What a protocol evaluates: a frozen backbone on two labeled sets."""

    train: Features
    val: Features
    num_classes: int
    args: argparse.Namespace
    config: dict[str, Any]  # the run's settings
    how: Extraction
    backbone: nn.Module
    train_photos: PhotoSet
    network: str = "teacher"  # or "student", or "untrained"


@dataclass(frozen=True)
class Protocol:
    """A protocol and its command `python -m evaluation.frozen.NAME`."""

    name: str
    about: str
    needs: Callable[[dict[str, Any]], tuple[str, ...]]  # settings of the run -> names of features
    scores: Callable[[Task], Scores]
    headlines: tuple[str, ...]  # the scores that stand for it in a line of Markdown
    options: tuple[Callable[[argparse.ArgumentParser], None], ...] = ()  # what adds its options
    checks: tuple[Callable[[argparse.Namespace], object], ...] = ()  # raise ValueError for bad ones

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Its command, see `command`."""
        return command([self], self.name, self.about, argv)


def make_parser(protocols: Sequence[Protocol], name: str, about: str) -> Parser:
    module = name if len(protocols) > 1 else f"frozen.{name}"
    parser = Parser(prog=f"python -m evaluation.{module}", description=about)
    add = parser.add_argument
    add_checkpoint_options(parser)
    add("--batch-size", type=int, default=128, help="images per forward pass (default: 128)")
    add("--train", required=True, help="labeled photos to train on: folder, tar or .beton")
    add("--val", required=True, help="labeled photos to evaluate on: folder, tar or .beton")
    add("--untrained", action="store_true", help="also evaluate the same network before training")
    add("--image-size", type=int, help="side of a view in pixels (default: the model's)")
    add("--cache", type=Path, help="folder for features (default: features/ beside the checkpoint)")
    for add_options in dict.fromkeys(one for protocol in protocols for one in protocol.options):
        add_options(parser)
    return parser


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command on a backbone: which network, how to compute, where to write."""
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, help="of a run, or an imported one")
    add(
        "--network",
        choices=("teacher", "student"),
        default="teacher",
        help="which of a checkpoint's networks to evaluate (default: teacher)",
    )
    add(
        "--workers",
        type=int,
        default=0,
        help="threads that decode (0: one per core, fewer for small photos)",
    )
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda, cuda:N or cpu",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of the forward pass (default: auto, fp16 on a GPU and fp32 on a CPU; fast: bf16 on a"
        " CPU with instructions for it)",
    )
    add("--json", type=Path, help="file for the scores (default: beside the checkpoint)")


def extraction_of(args: argparse.Namespace) -> Extraction:
    """How the command line wants features computed; under torchrun the group is joined. Raises
    ValueError or OSError, naming the option, for values that cannot work."""
    device = join_processes(args.device)[0]
    batch_size = getattr(args, "batch_size", 1)  # what takes images one by one has no such option
    if batch_size < 1 or args.workers < 0:
        raise ValueError("--batch-size must be at least 1 and --workers at least 0")
    # Refuses a precision that the device lacks; kept, so that the JSON says what auto was
    args.precision, _ = precision_on(device, args.precision)
    how = Extraction(device, batch_size, args.workers, args.precision)
    if args.json is not None and args.checkpoint.exists():
        check_output_file("--json", args.json, ".json", REPORT)
    folder = args.checkpoint.parent
    if args.json is None and folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written: give --json FILE")
    return how


def run(args: argparse.Namespace, protocols: Sequence[Protocol], path: Path) -> dict[str, Any]:
    """Run what the command line asks for; "scores" holds {network: {protocol: scores}},
    which are there on rank 0 alone. Of several protocols, one that does not fit the network is
    left out, and "left_out" says why. `path`: where the scores go without --json. Raises ValueError
    or OSError with a sentence for the user."""
    how = extraction_of(args)
    for check in dict.fromkeys(one for protocol in protocols for one in protocol.checks):
        check(args)
    backbone, head, config = load_with_head(args.checkpoint, args.network)
    networks: dict[str, tuple[nn.Module, IBOTHead | None]] = {args.network: (backbone, head)}
    if args.untrained:
        networks["untrained"] = untrained(config)
    size = args.image_size = view_size(args.image_size, config)
    given = settings_of(args, config, [name for name in vars(args) if name not in _FREE])
    if args.json is None:
        check_same_settings(path, given)
    train = PhotoSet(args.train, size)
    val = PhotoSet(args.val, size, train.classes)
    classes = max(train.num_classes, val.num_classes)
    check_classes(classes, f"--train {args.train}", f"--val {args.val}")
    if rank_and_size()[0] == 0 and (note := note_if_same(args.train, args.val)):
        print(note, file=sys.stderr)
    names, left_out = _needs(protocols, config)
    fitting = [protocol for protocol in protocols if protocol.name not in left_out]
    folder = args.cache or args.checkpoint.parent / "features"
    tasks = []  # all features come first: no rank waits for the arithmetic of rank 0
    for network, (backbone, head) in networks.items():
        backbone.to(how.device)
        if head is not None:
            head.to(how.device)
        own = sorted(names if head is not None else names - {"prototype"})
        learned, judged = (
            cached_features(folder, backbone, config, photos, own, how, head)
            for photos in (train, val)
        )
        tasks.append(Task(learned, judged, classes, args, config, how, backbone, train, network))
    scores: Columns = {}
    if rank_and_size()[0] == 0:
        for task in tasks:
            scores[task.network] = {protocol.name: protocol.scores(task) for protocol in fitting}
    return {**given, "left_out": left_out, "scores": scores}


def settings_of(
    args: argparse.Namespace, config: dict[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """The part of a report that says what was evaluated, and how."""
    given = {name: getattr(args, name) for name in ("checkpoint", "network", "precision", *names)}
    plain = {name: str(v) if isinstance(v, Path) else v for name, v in given.items()}
    return {**plain, "arch": config["arch"]}


def check_same_settings(path: Path, given: dict[str, Any]) -> None:
    """Raise FileExistsError if there are scores at `path` of other settings or data than `given`.
    Scores of the checkpoint as it was before may be replaced."""
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text())
    except ValueError:
        before = {}
    before = before if isinstance(before, dict) else {}
    now = {k: v for k, v in json.loads(json.dumps(given)).items() if k not in _MAY_DIFFER}
    # Earlier versions wrote fewer settings.
    if other := [flag(k) for k, v in now.items() if k in before and before[k] != v]:
        raise FileExistsError(
            f"{path} holds scores with other settings ({', '.join(other)}) and is not replaced:"
            " remove it, or give --json FILE"
        )


def _needs(
    protocols: Sequence[Protocol], config: dict[str, Any]
) -> tuple[set[str], dict[str, str]]:
    """Features that the protocols need, and why some of several do not fit the network."""
    names: set[str] = set()
    left_out: dict[str, str] = {}
    for protocol in protocols:
        try:
            names |= set(protocol.needs(config))
        except ValueError as reason:
            if len(protocols) == 1:
                raise
            left_out[protocol.name] = str(reason)
    return names, left_out


def command(
    protocols: Sequence[Protocol], name: str, about: str, argv: Sequence[str] | None = None
) -> int:
    """The whole command: 0 when done, exit status 2 with one sentence for bad input."""
    args = make_parser(protocols, name, about).parse_args(argv)
    beside = args.checkpoint.with_name(f"{args.checkpoint.stem}.{name}.json")

    def act() -> None:
        report = run(args, protocols, beside)
        if report["scores"]:
            fitting = [one for one in protocols if one.name not in report["left_out"]]
            headlines = [(one.name, score) for one in fitting for score in one.headlines]
            title = f"{name}: {report['val']} by {report['train']}"
            show_and_write(report, args.json or beside, title, headlines)

    try:
        return run_or_exit(act)
    finally:
        leave_group()


def write_json(report: dict[str, Any], path: Path) -> None:
    """Write the file whole or not at all."""
    write_text(path, json.dumps(report, indent=1) + "\n")


def show_and_write(
    report: dict[str, Any], path: Path, title: str, headlines: Sequence[tuple[str, str]]
) -> None:
    """Print all scores as a table, then the headlines (protocol, score) as Markdown if they fit,
    then what was left out. Then write the report: the scores are seen even if the disk is full."""
    console = plain_console(width=None if sys.stdout.isatty() else 100)
    print(title)  # not the table's own title, which would be wrapped to its width
    console.print(table(report["scores"]))
    lines = markdown(report["scores"], headlines)
    if len(lines.partition("\n")[0]) <= console.width:  # `ibeton report` writes all scores
        print(f"As Markdown:\n{lines}")
    for what, reason in report["left_out"].items():
        print(f"left out: {what}: {reason}")
    write_json(report, path)


def table(columns: Columns) -> Table:
    """One row per score of the first network, one column per network."""
    out = Table("protocol", "score", *(Column(name, justify="right") for name in columns))
    first = next(iter(columns.values()))
    for protocol, scores in first.items():
        for score in scores:
            values = [of[protocol].get(score) for of in columns.values()]
            texts = ["" if value is None else score_text(score, value) for value in values]
            out.add_row(protocol, score, *texts)
        out.add_section()
    return out


def score_text(name: str, value: float) -> str:
    """Counts as integers, learning rates and strengths as they were given, all else in percent."""
    if name.endswith(_COUNTS):
        return f"{value:,.0f}"
    if name.endswith(_SETTINGS):
        return f"{value:g}"
    return f"{value:.2f} %"


def markdown(columns: Columns, headlines: Sequence[tuple[str, str]]) -> str:
    """A table for a README: the headlines (protocol, score), a line for each network."""
    headings = [f"{name} {score}" for name, score in headlines]
    lines = [f"| network | {' | '.join(headings)} |", "| --- " * (1 + len(headings)) + "|"]
    for column, by_protocol in columns.items():
        values = [f"{by_protocol[name][score]:.2f}" for name, score in headlines]
        lines.append(f"| {column} | {' | '.join(values)} |")
    return "\n".join(lines)
