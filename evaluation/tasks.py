"""Commands on a frozen backbone whose data have a layout of their own: video, landmarks, copies.

A `FrozenTask` reads its data, then scores one network after the other. Its command prints
and writes what `evaluation.command` does.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn

from ibeton.command import run_or_exit
from ibeton.distributed import leave_group, rank_and_size
from ibeton.evaluation.command import (
    Columns,
    Scores,
    add_checkpoint_options,
    extraction_of,
    settings_of,
    show_and_write,
)
from ibeton.evaluation.frozen.features import Extraction
from ibeton.evaluation.networks import load_with_head, untrained, view_size
from ibeton.options import Parser

Data = TypeVar("Data")


@dataclass(frozen=True)
class Subject:
    """The network that a task evaluates."""

    name: str  # "teacher", "student" or "untrained"
    backbone: nn.Module  # on the device
    config: dict[str, Any]  # the run's settings
    how: Extraction


@dataclass(frozen=True)
class FrozenTask(Generic[Data]):
    """A task and its command `ibeton NAME`."""

    name: str
    about: str
    add_options: Callable[[argparse.ArgumentParser], None]
    settings: tuple[str, ...]  # options that the JSON repeats
    # Reads the layout; raises ValueError or OSError with a sentence for the user.
    read: Callable[[argparse.Namespace, dict[str, Any]], Data]
    scores: Callable[[argparse.Namespace, Data, Subject], dict[str, Scores]]
    headlines: tuple[str, ...]  # scores in the line of Markdown

    def main(self, argv: Sequence[str] | None = None) -> int:
        """The whole command: 0 when done, exit status 2 with one sentence for bad input."""
        parser = Parser(prog=f"ibeton {self.name}", description=self.about)
        add_checkpoint_options(parser)
        parser.add_argument(
            "--untrained",
            action="store_true",
            help="also evaluate the same network before training",
        )
        self.add_options(parser)
        args = parser.parse_args(argv)
        try:
            return run_or_exit(
                lambda: finish(run(args, self), self.name, args.json, self.headlines)
            )
        finally:
            leave_group()


def run(args: argparse.Namespace, task: FrozenTask) -> dict[str, Any]:
    """The report; "scores" holds {network: {protocol: scores}}. Raises ValueError or OSError with
    a sentence for the user."""
    how = extraction_of(args)
    one_process(task.name)
    backbone, _, config = load_with_head(args.checkpoint, args.network)
    if "image_size" in args:
        args.image_size = view_size(args.image_size, config)  # here, so that the JSON has it
    data = task.read(args, config)
    networks = {args.network: backbone}
    if args.untrained:
        networks["untrained"] = untrained(config)[0]
    scores: Columns = {}
    for name, network in networks.items():
        subject = Subject(name, network.to(how.device), config, how)
        scores[name] = task.scores(args, data, subject)
    return {**settings_of(args, config, task.settings), "left_out": {}, "scores": scores}


def one_process(name: str) -> None:
    """Raise ValueError in a group of several processes."""
    if rank_and_size()[1] > 1:
        raise ValueError(f"ibeton {name} uses one process; run it without torchrun or srun")


def finish(report: dict[str, Any], name: str, path: Path | None, headlines: Sequence[str]) -> Path:
    """Print and write a report; its path, which is beside the checkpoint where none is given."""
    first = next(iter(report["scores"].values()))
    if path is None:
        sets = "+".join(protocol for protocol in first if protocol != name)
        checkpoint = Path(report["checkpoint"])
        path = checkpoint.with_name(".".join(filter(None, (checkpoint.stem, name, sets, "json"))))
    chosen = [(protocol, s) for protocol in first for s in headlines if s in first[protocol]]
    show_and_write(report, path, name, chosen)
    return path
