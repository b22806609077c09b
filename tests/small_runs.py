"""Small runs as processes, the photos they train on, and what they leave."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from paths import ROOT
from PIL import Image

from ibeton.pipeline.convert.converter import ConvertOptions, convert
from ibeton.pipeline.loaders import LOADERS

FORKER = Path(__file__).with_name("forker.py")
PER_EPOCH = 8
# A model and views that take milliseconds a step
SMALL_MODEL = shlex.split(
    "--arch vit_t --embed-dim 32 --depth 2 --num-heads 2 --patch-size 8 --image-size 32"
    " --global-crops-size 32 --local-crops-size 16 --local-crops-number 2"
    " --out-dim 64 --hidden-dim 32 --bottleneck-dim 16 --workers 1 --device cpu"
)
# A run of 8 steps an epoch on the fixture `tiny`
SMALL_RUN = shlex.split(
    "--warmup-epochs 1 --epochs 3 --warmup-teacher-temp-epochs 1 --log-steps 1 --lr 4e-3"
    " --drop-path 0.2"
)
SMALL = [*SMALL_MODEL, *SMALL_RUN, "--batch-size", "8"]
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
        """The whole lines of the log: the last one may be half written."""
        path = self.folder / "log.jsonl"
        text = path.read_text() if path.exists() else ""
        return text[: text.rfind("\n") + 1]

    def wait(self) -> int:
        assert self._forker.stdout is not None
        if self.status is None:
            self.status = int(self._forker.stdout.readline())
        return self.status

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; fails if the run ends before."""
        while not condition():
            if not Path(f"/proc/{self.pid}/exe").exists():
                assert condition(), self.said()[-3000:]  # it may have ended since
                return
            time.sleep(0.002)


Start = Callable[..., Process]
# A fault: the run stops after the record of step {step} until a signal ends it. A test that kills
# it after an earlier step cannot be too late, however busy the machine is.
HOLD = """
import time
from ibeton.training.log.run_log import RunLog
record = RunLog.record
def hold(self, line):
    record(self, line)
    while line["step"] >= {step}:
        time.sleep(1)
RunLog.record = hold
"""


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[Any, ...]]:
    """What each step came to: all numbers that do not hang on the clock."""
    names = ("step", "loss", "cls", "patch", "teacher_entropy", "grad_norm", "spread", "lr")
    return [tuple(r[name] for name in names) for r in records(folder) if "loss" in r]


def noise_beton(folder: Path, count: int) -> Path:
    """A .beton file in `folder` of `count` photos of noise, 48 x 40 pixels."""
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(count):
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.jpg")
    convert(folder / "photos", folder / "photos.beton", ConvertOptions(workers=1))
    return folder / "photos.beton"


def torchrun(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script and its arguments in two processes of torchrun, which must end with status 0."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, *command],
        **{"capture_output": True, "text": True, "check": False},
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


# A program of the package in which rank 1 takes a second longer for each update of the teacher
SLOW_RANK = """
import os, sys, time
sys.path.insert(0, {root!r})
from {module} import main
from ibeton.model import IBOT
update = IBOT.update_teacher
def slow(self, *arguments):
    time.sleep(1.0 if os.environ["RANK"] == "1" else 0.0)
    update(self, *arguments)
IBOT.update_teacher = slow
if __name__ == "__main__":  # worker processes import this file
    sys.exit(main(sys.argv[1:]))
"""


def with_a_slow_rank(
    module: str, folder: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """`module`'s command in two processes, of which rank 1 is slow in stage "ema"."""
    script = folder / "slow_rank.py"
    script.write_text(SLOW_RANK.format(root=str(ROOT), module=module))
    return torchrun(str(script), *arguments)


class Ticks:
    """A clock that hardly moves by itself, so that how busy the machine is does not count."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now
