"""The command line of a small run, the run as a process, and what it says of bad input."""

import shlex
from pathlib import Path

import pytest
from run_processes import Forker, Process

from ibeton.evaluation.finetune.__main__ import main

# 24 photos in batches of 8: 3 steps per epoch
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


@pytest.fixture(scope="session")
def forker(tmp_path_factory):
    forker = Forker("ibeton.evaluation.finetune.__main__", tmp_path_factory.mktemp("said"))
    yield forker
    forker.close()


@pytest.fixture
def start(forker, given):
    """Begins a run as a process: `start(folder, *options, environment={}, fault="")`."""

    def begin(
        folder: Path,
        *options: object,
        environment: dict[str, str] | None = None,
        fault: str = "",
    ) -> Process:
        return forker.start(folder, given(folder, *options), environment, fault)

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
