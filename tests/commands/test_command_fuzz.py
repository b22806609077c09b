"""Mutated command lines of every subcommand: no traceback, no hang, no crash, an exit status as
documented, and nothing of the user's changed."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from user_files import write_user_files

from ibeton.__main__ import COMMANDS

LINES = 300
FUZZER = Path(__file__).with_name("fuzzer.py")
# Some lines ask these for more work than the fuzzer waits for.
WORK_LONG = ("train", "throughput", "finetune", "segment", "detect", "linear", "evaluate", "davis")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]  # minutes alone, hours beside other work


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written")
    write_user_files(root)
    return root


@pytest.fixture
def files(written: Path, tmp_path: Path) -> Path:
    """A copy for each command: some lines name a folder of photos as the folder of a run."""
    return Path(shutil.copytree(written, tmp_path / "user", symlinks=True))


def digests(root: Path) -> dict[Path, str]:
    found = (path for path in root.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def fuzzed(command: str, seed: int, count: int, files: Path) -> list[dict[str, Any]]:
    """What each of `count` mutated lines did."""
    done = subprocess.run(
        [sys.executable, str(FUZZER), command, str(seed), str(count), str(files)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=files,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def faults(found: dict[str, Any], command: str) -> list[str]:
    """What is wrong with how a line ended."""
    status, said = found["status"], found["said"]
    allowed = [0, 1, 2, *(["works"] if command in WORK_LONG else [])]
    allowed += [85] if "--max-hours" in " ".join(found["words"]) else []
    wrong = [] if status in allowed else [f"status {status}"]
    if "Traceback" in said:
        wrong.append("a traceback")
    if status in (1, 2) and "error: " not in said:
        wrong.append("no sentence")
    if status == 2 and found["left"]:
        wrong.append(f"refused, after it wrote {found['left'][:3]}")
    return wrong


@pytest.mark.parametrize("command", COMMANDS)
def test_mutated_lines_end_as_documented(command: str, files: Path) -> None:
    before = digests(files)
    lines = fuzzed(command, 5, LINES, files)
    assert len(lines) == LINES
    assert lines[0]["status"] == 0, lines[0]
    for found in lines:
        assert not faults(found, command), json.dumps(found, indent=1)
    after = digests(files)
    assert {path: after.get(path) for path in before} == before


@pytest.mark.parametrize("command", COMMANDS)
def test_so_do_some_as_processes_of_their_own(command: str, files: Path, tmp_path: Path) -> None:
    for i, found in enumerate(fuzzed(command, 6, 4, files)):
        here = tmp_path / str(i)
        here.mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "ibeton", command, *found["words"]],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            cwd=here,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        found |= {"status": done.returncode, "said": done.stdout + done.stderr, "left": []}
        assert not faults(found, command), json.dumps(found, indent=1)
