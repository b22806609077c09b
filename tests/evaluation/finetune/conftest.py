"""The command line of a small run, the run as a process, and what it says of bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_runs import QUICK, Process

from ibeton.evaluation.finetune.__main__ import main


@pytest.fixture
def given(checkpoint, folders):
    """The command line of a small run in a folder, with further options."""

    def options(folder: Path, *also: object) -> list[str]:
        paths = ("--checkpoint", checkpoint, "--train", folders[0], "--val", folders[1])
        return [str(one) for one in (*paths, "--output-dir", folder, *QUICK, *also)]

    return options


@pytest.fixture(scope="session")
def forker():
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("finetune_forker.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    yield process
    process.stdin.close()
    process.wait(60)


@pytest.fixture
def start(forker, given, tmp_path):
    """Begins a run as a process: `start(folder, *options, environment={})`."""

    def begin(folder: Path, *options: object, environment: dict[str, str] | None = None) -> Process:
        begin.count += 1
        output = tmp_path / f"{begin.count}.said"
        job = {"arguments": given(folder, *options), "output": str(output)}
        forker.stdin.write(json.dumps({**job, "environment": environment or {}}) + "\n")
        forker.stdin.flush()
        return Process(int(forker.stdout.readline()), folder, output)

    begin.count = 0
    return begin


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
