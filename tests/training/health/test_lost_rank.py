"""A process of a training that is killed or stopped: the other ends and names it, what was saved is
whole, and the run goes on from there. The same over a network is in test_network.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from slurm import ROOT, end, free_job, srun_words, start, wait_for
from small_runs import SMALL, losses

from ibeton.training.health.watchdog import HUNG
from ibeton.training.runs import summary

OPTIONS = ("--batch-size", "4", "--epochs", "40", "--save-steps", "5", "--keep-every", "0")
LIMITS = ("--lost-after", "8", "--resume", "auto")


def begin(data: Path, folder: Path, *options: str) -> list[subprocess.Popen[bytes]]:
    """Two tasks of srun, on this machine."""
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, *OPTIONS, *LIMITS, *options]
    command += ["--data", str(data), "--output-dir", str(folder / "run")]
    job = free_job()
    return [start(command, folder, f"rank{rank}", srun_words(rank, 2, job)) for rank in range(2)]


def said(folder: Path, rank: int) -> str:
    return (folder / f"rank{rank}.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "victim", "words"),
    [
        (signal.SIGKILL, 1, "rank 1 ("),
        (signal.SIGKILL, 0, "rank 1 has had no answer from rank 0"),
        (signal.SIGSTOP, 1, "rank 1 ("),
    ],
)
def test_the_other_rank_ends_and_the_run_goes_on(
    fault: signal.Signals, victim: int, words: str, tiny: Path, tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    members = begin(tiny, tmp_path)
    try:
        wait_for(lambda: log.exists() and '"step": 7,' in log.read_text(), members)
        os.killpg(members[victim].pid, fault)
        assert members[1 - victim].wait() == HUNG
    finally:
        end(members)
    assert words in said(tmp_path, 1 - victim)
    assert "--resume auto continues from the last checkpoint, if there is one" in said(
        tmp_path, 1 - victim
    )
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    assert saved >= 5
    assert summary(folder)["state"] == "killed"
    members = begin(tiny, tmp_path, "--stop-after", str(saved + 6))
    try:
        assert [member.wait() for member in members] == [0, 0], said(tmp_path, 0)
    finally:
        end(members)
    assert f"resumed at step {saved} " in said(tmp_path, 0)
    assert [record[0] for record in losses(folder)] == list(range(saved + 6))
