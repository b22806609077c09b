"""The command line of a small run, and what it says of bad input."""

from pathlib import Path

import pytest
from finetune_runs import QUICK

from ibeton.evaluation.finetune.__main__ import main


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
