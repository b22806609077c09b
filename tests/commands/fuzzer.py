"""Mutated command lines of one subcommand of `ibeton`: what each does, as a line of JSON.

    python fuzzer.py COMMAND SEED COUNT USER_FILES

Imports the command once and forks for each line. Options and kinds of values come from the
command's own parser.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from ibeton import options
from ibeton.__main__ import COMMANDS, main

CPU_S = 40  # a command that is still at work after so much CPU time has been accepted
STILL_S = 600  # without any use of the CPU, on however busy a machine: it hangs
MEMORY = 12 << 30

SMALL = shlex.split(
    "--arch vit_t --embed-dim 32 --depth 1 --num-heads 2 --patch-size 8 --image-size 32"
    " --global-crops-size 32 --local-crops-size 16 --local-crops-number 1 --batch-size 4"
    " --out-dim 16 --hidden-dim 16 --bottleneck-dim 8 --epochs 1 --workers 1 --device cpu"
)
SETS = "--checkpoint {in}/checkpoint.pt --train {in}/photos --val {in}/val --cache {out}/features"
SCORES = "--json {out}/scores.json --device cpu --workers 1"
ONE = "--checkpoint {in}/checkpoint.pt --device cpu"
DENSE = f"{ONE} --output-dir {{out}}/run --workers 0 --batch-size 2 --warmup-steps 0 --pictures 1"
# command -> command lines that work
LINES = {
    "train": ["--data {in}/photos.beton --output-dir {out}/run --stop-after 1"],
    "convert": ["{in}/photos {out}/x.beton --workers 1", "{in}/photos.beton --verify --workers 1"],
    "merge": ["{in}/shard1.beton {in}/shard2.beton {out}/x.beton"],
    "knn": [f"{SETS} {SCORES} --k 3"],
    "linear": [f"{SETS} {SCORES} --epochs 2 --lr 0.1 --save-head {{out}}/head.pt"],
    "evaluate": [f"{SETS} {SCORES} --epochs 2 --lr 0.1 --k 3"],
    "finetune": [
        f"{ONE} --train {{in}}/photos --val {{in}}/val --output-dir {{out}}/run --epochs 1"
        " --batch-size 4 --warmup-epochs 0 --workers 1 --stop-after 1"
    ],
    "segment": [f"{DENSE} --data {{in}}/ade --steps 1 --crop-size 32 --short-side 32"],
    "detect": [f"{DENSE} --data {{in}}/coco --epochs 1 --short-sides 32 --long-side 48"],
    "robustness": [
        f"{ONE} {SCORES} --head {{in}}/linear.pt --val {{in}}/val --imagenet-c {{in}}/c"
    ],
    "davis": [f"{ONE} {SCORES} --data {{in}}/DAVIS --short-side 64 --masks {{out}}/masks"],
    "retrieve": [f"{ONE} {SCORES} --data {{in}}/roxford5k"],
    "copies": [f"{ONE} {SCORES} --data {{in}}/copydays --whitening {{in}}/photos"],
    "correspondence": [f"{ONE} {SCORES} --data {{in}}/val"],
    "report": ["{in}/runs/one --output {out}/report.md"],
    "show": [
        f"{kind} {ONE} --data {{in}}/val --output {{out}}/picture.png"
        for kind in ("attention", "patterns", "correspondence", "neighbors")
    ],
    "inspect": ["{in}/checkpoint.pt", "{in}/foreign.pth --num-heads 2"],
    "import": ["{in}/foreign.pth {out}/imported.pt --num-heads 2"],
    "export": [
        f"{{in}}/checkpoint.pt {{out}}/{name} --to {kind}"
        for kind, name in (("timm", "x.safetensors"), ("huggingface", "hf"), ("ibot", "x.pth"))
    ],
    "runs": ["{in}/runs", "compare {in}/runs/one {in}/runs/two --png {out}/x.png"],
    "doctor": [""],
    "plan": ["--arch vit_s --epochs 800 --gpu v100 --gpus 16 --json {out}/plan.json"],
    "throughput": [
        "--rounds 1 --steps 1 --report {out}/report --data {in}/many.beton",
        "--compare {in}/throughput.json {in}/throughput.json",
    ],
}
# what commands import late, and would import anew for each line
LATE = {
    "export": ("timm", "transformers.models.vit.modeling_vit"),
    "import": ("timm",),
    "finetune": ("timm.data.mixup", "timm.scheduler", "timm.utils"),
    "segment": ("transformers.models.upernet.modeling_upernet",),
    "detect": ("faster_coco_eval",),
    "runs": ("matplotlib.pyplot",),
    "train": ("torch.utils.tensorboard",),
}
WITH_MODEL = ("train", "throughput")  # lines that end with SMALL
LARGE = {"vit_s", "vit_b", "vit_l", "swin_t7", "swin_t14", "swin_s7", "swin_s14", "swin_b7"}
NUMBERS = ("0", "1", "2", "3", "-1", "7", "0.5", "1e-3", "1.5", "-0.1", "100", "nan", "inf", "")
NUMBERS += ("1e999", "99999999999999999999", "x", "1,5", "0x10", "true", "٣")
WORDS = (
    "",
    "-",
    "--",
    "--nonsense",
    "-x",
    "@args",
    "[/final]",
    "[bold",
    "a b",
    "ü",
    "\udcff",
    "%s",
)
WORDS += ("x" * 300, "--help=1", "=", "auto", "none", "{in}/photos", "--no-", "--k=")


class Seen(Exception):
    """Carries a parser to `parser_of`."""


def parser_of(words: list[str]) -> argparse.ArgumentParser | None:
    """The parser that a command line goes to; None where a command has none."""

    def caught(self: Any, args: Any = None, namespace: Any = None) -> Any:
        raise Seen(self)

    real = options.Parser.parse_args, options.Parser.parse_known_args
    options.Parser.parse_args = options.Parser.parse_known_args = caught  # type: ignore
    try:
        with contextlib.redirect_stdout(None):
            main(words)
    except Seen as seen:
        parser: argparse.ArgumentParser = seen.args[0]
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parser = next(p for name, p in action.choices.items() if name in words)
        return parser
    finally:
        options.Parser.parse_args, options.Parser.parse_known_args = real  # type: ignore
    return None


def value_for(action: argparse.Action | None, draws: random.Random, paths: list[str]) -> str:
    kind = draws.random()
    if action is not None and kind < 0.6:
        if action.choices is not None:
            return draws.choice([c for c in map(str, action.choices) if c not in LARGE] or ["x"])
        if action.type in (int, float, options.finite):
            return draws.choice(NUMBERS)
        return draws.choice(paths)
    return draws.choice([*draws.choice((NUMBERS, WORDS, tuple(paths)))])


def mutated(words: list[str], actions: list[Any], draws: random.Random, paths: list[str]) -> Any:
    """The line with one to three changes."""
    words = list(words)
    for _ in range(draws.choice((1, 1, 1, 2, 3))):
        kind = draws.choice((0, 0, 0, 2, 3, 4, 5, 5, 5))
        place = draws.randrange(len(words) + 1)
        if kind == 0 and actions:  # another option, or one again
            action = draws.choice(actions)
            words += [draws.choice(action.option_strings)]
            if action.nargs != 0:
                words += [value_for(action, draws, paths) for _ in range(draws.choice((1, 1, 2)))]
        elif kind == 2 and place < len(words):
            del words[place]
        elif kind == 3:
            words.insert(place, draws.choice(WORDS))
        elif kind == 4 and place < len(words) and words[place]:
            letters = list(words[place])
            letters[draws.randrange(len(letters))] = draws.choice("-_=[ä/.0x")
            words[place] = "".join(letters)
        elif place < len(words):
            before = words[place - 1] if place else ""
            action = next((a for a in actions if before in a.option_strings), None)
            words[place] = value_for(action, draws, paths)
    return words


def ended(words: list[str], out: Path) -> tuple[int | str, str]:
    """Run a command line in a fork: its status, or "hangs", and what it said."""
    said = out.with_name("said")
    pid = os.fork()
    if pid == 0:
        os.setsid()
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(file, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(out)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        status = 1
        try:
            status = main(words)
        except SystemExit as stop:
            code = stop.code
            status = code if isinstance(code, int) else 0 if code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(status)
    status = waited(pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return status, said.read_text(errors="replace")


def waited(pid: int) -> int | str:
    used, since = 0.0, time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return "works" if code == -signal.SIGXCPU else code
        now = cpu_of(pid)
        if now > used:
            used, since = now, time.monotonic()
        if time.monotonic() - since > STILL_S:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hangs"
        time.sleep(0.01)


def cpu_of(group: int) -> float:
    """CPU time of all processes of a session, in ticks."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == group:
                total += int(fields[11]) + int(fields[12])
    return total


def fuzz(command: str, seed: int, count: int, files: Path) -> None:
    sys.argv = [f"ibeton {command}"]
    importlib.import_module(f"ibeton.{COMMANDS[command][0]}")
    for module in LATE.get(command, ()):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    root = Path(tempfile.mkdtemp(prefix="fuzz"))
    out = root / "out"
    draws = random.Random(seed)
    paths = sorted(str(path) for path in files.iterdir())
    paths += [
        f"{files}/missing",
        f"{files}/photos/dark/1.jpg",
        "/dev/null",
        "/proc/x/y",
        "~/x",
        ".",
    ]
    paths += ["{out}/new", "{out}/new.png", "{out}/no/folder/x.json", "{out}", "/" + "x" * 300]
    for number in range(count):
        out.mkdir()
        line = draws.choice(LINES[command]).split()
        words = [w.format(**{"in": files, "out": out}) for w in line]
        words += SMALL if command in WITH_MODEL else []
        parser = parser_of([command, *words])
        actions = [a for a in parser._actions if a.option_strings] if parser else []
        if command in ("plan", "throughput"):  # they hand options on
            train = parser_of(["train", *SMALL])
            actions += [a for a in train._actions if a.option_strings] if train else []
        if number:  # the first one is as it should be
            places = [path.replace("{out}", str(out)) for path in paths]
            words = mutated(words, actions, draws, places)
        words = [word.replace("{in}", str(files)) for word in words]
        began = time.monotonic()
        status, said = ended([command, *words], out)
        left = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
        found = {"words": words, "status": status, "said": said[-6000:], "left": left}
        print(json.dumps({**found, "s": round(time.monotonic() - began, 1)}), flush=True)
        shutil.rmtree(out)
    shutil.rmtree(root)


if __name__ == "__main__":
    fuzz(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
