"""How commands end: what was done decides the status, whatever becomes of the output."""

import errno
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from paths import ROOT

from ibeton.__main__ import main as ibeton
from ibeton.command import Failure, explain

# Writes a file, says so in letters that not every encoding has, and is done.
SCRIPT = """
import sys
from pathlib import Path
from ibeton.command import run_command

def act():
    Path(sys.argv[1]).write_text("done")
    for _ in range(3000):
        print("written: caf\\u00e9 \\u2192 \\udcff.beton")
    return 0

sys.exit(run_command(act))
"""


def ended(target: Path, stdout: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(target)],
        stdout=stdout,  # type: ignore[call-overload]
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )


def test_the_versions_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert ibeton(["--version"]) == 0
    assert f"torch {metadata.version('torch')}\n" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_that_the_terminal_lacks_are_escaped(encoding: str, tmp_path: Path) -> None:
    done = ended(tmp_path / "file", subprocess.PIPE, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"written: caf") == 3000
    assert b"\\udcff.beton" in done.stdout
    assert not done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_for_the_output_costs_the_output_alone(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = ended(tmp_path / "file", full)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_text() == "done"
    assert done.stderr.decode().count("output is lost from here on: ") == 1
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_a_reader_that_leaves_costs_nothing(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = ended(tmp_path / "file", write)
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("can't start new thread"), "give fewer --workers"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "was killed"),
        (MemoryError("Unable to allocate 9 TiB"), "too little memory"),
        (RuntimeError("x: can't allocate memory: you tried to allocate 9 bytes."), "9 bytes"),
        (torch.OutOfMemoryError("CUDA out of memory."), "the GPU has too little memory"),
        (OSError(errno.ENOSPC, "No space left on device", "a.pt"), "a.pt: No space left on device"),
        (Failure("one sentence"), "one sentence"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ""),
        (KeyError("momentum"), ""),
    ],
)
def test_what_a_user_can_cause_is_explained_and_a_bug_is_not(error: Exception, says: str) -> None:
    assert says in explain(error)
    assert bool(says) == bool(explain(error))
    assert "\n" not in explain(error)
