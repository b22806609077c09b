"""Small runs as processes, and what they leave."""

import json
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ibeton.pipeline.loaders import LOADERS

FORKER = Path(__file__).with_name("forker.py")
PER_EPOCH = 8
# A run of 8 steps an epoch.
SMALL = shlex.split(
    "--arch vit_t --embed-dim 32 --depth 2 --num-heads 2 --patch-size 8 --image-size 32"
    " --global-crops-size 32 --local-crops-size 16 --local-crops-number 2 --batch-size 8"
    " --out-dim 64 --hidden-dim 32 --bottleneck-dim 16 --warmup-epochs 1 --epochs 3"
    " --warmup-teacher-temp-epochs 1 --log-steps 1 --lr 4e-3 --workers 1 --device cpu"
    " --drop-path 0.2"
)
# Both give the same views; DALI needs no process of its own, which saves seconds a run.
SMALL += ["--loader", "pil" if LOADERS["dali"].problem() else "dali"]


class Process:
    """A run under way: `wait` gives its exit status, negative for a signal."""

    def __init__(self, forker: subprocess.Popen[str], folder: Path, output: Path) -> None:
        assert forker.stdout is not None
        self._forker, self.folder, self.output = forker, folder, output
        self.pid = int(forker.stdout.readline())
        self.status: int | None = None

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""  # it has yet to begin

    def log(self) -> str:
        path = self.folder / "log.jsonl"
        return path.read_text() if path.exists() else ""

    def wait(self) -> int:
        assert self._forker.stdout is not None
        if self.status is None:
            self.status = int(self._forker.stdout.readline())
        return self.status

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds, while the run goes on."""
        deadline = time.monotonic() + 200
        while not condition():
            assert Path(f"/proc/{self.pid}/exe").exists(), self.said()[-3000:]
            assert time.monotonic() < deadline, self.said()[-3000:]
            time.sleep(0.002)


Start = Callable[..., Process]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[Any, ...]]:
    """What each step came to: all numbers that do not hang on the clock."""
    names = ("step", "loss", "cls", "patch", "teacher_entropy", "grad_norm", "spread", "lr")
    return [tuple(r[name] for name in names) for r in records(folder) if "loss" in r]
