"""Small labeled folders that a small backbone learns in seconds, and how to run the command."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from ibeton.evaluation.finetune.__main__ import main

STEPS_PER_EPOCH = 3  # 24 photos in batches of 8
QUICK = shlex.split(
    "--epochs 4 --warmup-epochs 1 --batch-size 8 --mix-images 4 --lr 1e-3 --lr-batch-size 8"
    " --workers 1 --log-steps 1 --device cpu"
)


@pytest.fixture
def given(checkpoint, folders):
    """The command line of a small run in a folder, with further options."""

    def options(folder: Path, *also: object) -> list[str]:
        paths = ("--checkpoint", checkpoint, "--train", folders[0], "--val", folders[1])
        return [str(one) for one in (*paths, "--output-dir", folder, *QUICK, *also)]

    return options


@pytest.fixture
def refused(capsys):
    """Run the command on bad input: what it says, which must be one sentence, with status 2."""

    def run(options: list[str], folder: Path) -> str:
        assert main(options) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert said[0].startswith("reading ")
        assert len(said) == 2
        assert said[1].startswith("error: ")
        assert not folder.exists(), "something was written"
        return said[1]

    return run


def start(options: list[str], processes: int = 1) -> subprocess.Popen:
    """The command as a process of its own, under torchrun for several."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    before = torchrun if processes > 1 else ()
    return subprocess.Popen(
        [sys.executable, *before, "-m", "ibeton.evaluation.finetune", *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
