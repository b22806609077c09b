"""The command `ibeton`: one subcommand for each program of the package.

    ibeton train --arch vit_s --epochs 800 --data imagenet.beton

Subcommands take the same options as the modules they run.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from ibeton.command import missing_extra
from ibeton.workers import before_torch

_CHECKPOINT = "model.checkpoint.__main__"  # which takes the subcommand itself as first argument
# subcommand -> (module with `main(argv)`, help)
COMMANDS = {
    "train": ("train", "pre-train a backbone"),
    "convert": ("pipeline.convert.converter", "photos to one .beton file"),
    "merge": ("pipeline.convert.merge", "the shards of a conversion to one file"),
    "knn": ("evaluation.frozen.knn", "k-NN accuracy of frozen features"),
    "linear": ("evaluation.frozen.linear", "linear probing of frozen features"),
    "finetune": ("evaluation.finetune.__main__", "train a backbone further with labels"),
    "evaluate": ("evaluation.all", "all protocols on frozen features"),
    "segment": ("evaluation.segment", "train and score segmentation (ADE20K)"),
    "detect": ("evaluation.detect", "train and score detection (COCO)"),
    "robustness": ("evaluation.robustness.__main__", "ImageNet-A, -R, -C, occlusion, ..."),
    "davis": ("evaluation.matching.davis", "video object segmentation by label propagation"),
    "retrieve": ("evaluation.matching.landmarks", "landmarks of revisited Oxford and Paris"),
    "copies": ("evaluation.matching.copies", "copy detection on Copydays"),
    "correspondence": ("evaluation.matching.correspondence", "patches found in another view"),
    "report": ("evaluation.report", "all figures of a backbone on one page"),
    "show": ("evaluation.show", "pictures of what a backbone sees"),
    "inspect": (_CHECKPOINT, "list what a checkpoint holds"),
    "import": (_CHECKPOINT, "read weights of iBOT, DINO, timm and others"),
    "export": (_CHECKPOINT, "write timm, Hugging Face or iBOT weights"),
    "runs": ("training.runs", "list runs, or compare two"),
    "doctor": ("pipeline.doctor", "what is installed, what is missing, how to fix it"),
    "plan": ("benchmarks.plan", "about how long a run takes on other GPUs"),
    "throughput": ("benchmarks.throughput", "profile the loader, the model and both together"),
}


def usage() -> str:
    """The text of `ibeton --help`."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {help}" for name, (_, help) in COMMANDS.items())
    return (
        f"usage: ibeton COMMAND [OPTIONS]\n\n{lines}\n\n`ibeton COMMAND --help` lists options;"
        " `ibeton --version` prints the versions."
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status; 2 for an unknown one."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(", ".join(f"{package} {_version(package)}" for package in ("ibeton", "torch")))
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean `ibeton {near[0]}`?" if near else "`ibeton --help` lists commands"
        print(f"error: unknown command {name!r}: {hint}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[name]
    before_torch()
    sys.argv[0] = f"ibeton {name}"  # what usage and errors call the program
    try:
        program = importlib.import_module(f"ibeton.{module}")
    except ModuleNotFoundError as error:
        if not (words := missing_extra(error.name)):
            raise
        print(f"error: {words}", file=sys.stderr)
        return 2
    return program.main([name, *rest] if module == _CHECKPOINT else rest) or 0


if __name__ == "__main__":
    sys.exit(main())
