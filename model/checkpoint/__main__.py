"""Weights in and out.

python -m model.checkpoint import  SRC DST    a checkpoint of iBOT, DINO or timm -> ours
python -m model.checkpoint export  SRC DST --to timm|huggingface|ibot|ibot-backbone
python -m model.checkpoint inspect FILE       what a checkpoint holds
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from ibeton.command import run_or_exit
from ibeton.model.checkpoint.export import refuse_existing
from ibeton.model.checkpoint.export_huggingface import export_huggingface
from ibeton.model.checkpoint.export_ibot import export_ibot, export_ibot_backbone
from ibeton.model.checkpoint.export_timm import export_timm
from ibeton.model.checkpoint.files import NETWORKS, listed, read_own, save_checkpoint
from ibeton.model.checkpoint.foreign import Foreign, read_foreign
from ibeton.options import Parser
from ibeton.progress import plain_console

SIZED = {"timm": export_timm, "huggingface": export_huggingface}
PUBLISHED = {"ibot": export_ibot, "ibot-backbone": export_ibot_backbone}


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m model.checkpoint", description="Weights in and out.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    take = commands.add_parser("import", help="weights of iBOT, DINO, timm or others -> ours")
    take.add_argument("source", type=Path, help="checkpoint or weights of another program")
    take.add_argument("target", type=Path, help="checkpoint to write")
    give = commands.add_parser("export", help="a checkpoint of ours -> what others read")
    give.add_argument("source", type=Path, help="checkpoint that train.py or an import wrote")
    give.add_argument("target", type=Path, help="file to write (huggingface: folder)")
    give.add_argument("--to", choices=(*SIZED, *PUBLISHED), required=True, help="format to write")
    give.add_argument(
        "--image-size",
        type=int,
        default=0,
        help="side in pixels at which the features are exact (0: the checkpoint's)",
    )
    look = commands.add_parser("inspect", help="what a checkpoint holds")
    look.add_argument(
        "source", type=Path, help="checkpoint or weights of any kind that can be imported"
    )
    for command in (take, give, look):
        command.add_argument(
            "--network",
            choices=NETWORKS,
            default="teacher",
            help="which network to take (default: teacher)",
        )
    for command in (take, look):
        command.add_argument(
            "--num-heads",
            type=int,
            default=0,
            help="attention heads of a ViT that is no published size",
        )
    return parser


def run_import(args: argparse.Namespace) -> None:
    refuse_existing(args.target)
    foreign = read_foreign(args.source, args.network, args.num_heads)
    save_checkpoint(args.target, foreign.content)
    print(f"{args.target}: {_said(foreign)}")


def _said(foreign: Foreign) -> str:
    """One line about an import: what it was, and what was left behind."""
    config = foreign.content["config"]
    kept = sum(len(part) for name, part in foreign.content.items() if name != "config")
    unused = listed(foreign.unused) if foreign.unused else "none"
    return (
        f"{foreign.layout} of {config['arch']}, {config['image_size']} pixels;"
        f" {kept} tensors kept, none missing, unused: {unused}"
    )


def run_export(args: argparse.Namespace) -> None:
    if args.image_size < 0:
        raise ValueError(f"--image-size {args.image_size}: give the side of an image in pixels")
    if args.to in SIZED:
        call = SIZED[args.to](args.source, args.target, args.network, args.image_size)
        said = "gives the same features"
    elif args.image_size:
        raise ValueError(f"--image-size is for timm and huggingface: --to {args.to} has every size")
    else:
        call = PUBLISHED[args.to](args.source, args.target, args.network)
        said = "reads back the same"
    print(f"{args.target} {said}. Load it by\n  {call}")


def run_inspect(args: argparse.Namespace) -> None:
    """A row for each part of the file, and the settings that tell its architecture."""
    content, kind = read_own(args.source), "a checkpoint of ibeton"
    if content is None:
        foreign = read_foreign(args.source, args.network, args.num_heads)
        content, kind = foreign.content, _said(foreign)
    table = Table()
    for heading in ("entry", "tensors", "values"):
        table.add_column(heading, justify="left" if heading == "entry" else "right")
    for name, value in content.items():
        for part, tensors in _parts(name, value):
            table.add_row(part, str(len(tensors)), f"{sum(t.numel() for t in tensors):,}")
        if isinstance(value, int | float | str):
            table.add_row(name, "", str(value))
    config = content["config"]
    table.add_section()
    shown = ["arch", "embed_dim", "depth", "num_heads", "patch_size", "image_size"]
    for name in shown + ["out_dim"] * ("student" in content):
        table.add_row(name, "", "as arch says" if config[name] == 0 else str(config[name]))
    print(f"{args.source}: {kind}")
    plain_console().print(table)


def _parts(name: str, value: Any) -> list[tuple[str, list[Tensor]]]:
    """Backbone and head of a network apart; other entries as they are, if they are tensors."""
    if not isinstance(value, dict) or not all(isinstance(t, Tensor) for t in value.values()):
        return []
    groups: dict[str, list[Tensor]] = {}
    for key, tensor in value.items():
        part = key.split(".")[0] if name in NETWORKS else ""
        groups.setdefault(f"{name} {part}".strip(), []).append(tensor)
    return list(groups.items())


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    commands = {"import": run_import, "export": run_export, "inspect": run_inspect}
    run_or_exit(lambda: commands[args.command](args))


if __name__ == "__main__":
    main()
