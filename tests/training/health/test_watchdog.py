"""Real processes that are killed, stopped, or hang by themselves: every other one ends, and says
which. That they end within the tests' limit of time is the bound; no test measures it.

Limits of 10 s are many times what the group needs for a step, on a busy machine too.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from paths import ROOT
from slurm import end, free_job, srun_words, start, wait_for

from ibeton.training.health.watchdog import HUNG

MEMBER = str(ROOT / "tests" / "training" / "group_member.py")
Group = list[subprocess.Popen[bytes]]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Callable[..., Group]]:
    """(processes, fault, lost_after, stall_after) -> the processes of a group that steps."""
    started: Group = []

    def begin(tasks: int, fault: str = "none", lost: float = 10, stall: float = 600) -> Group:
        command = [sys.executable, MEMBER, str(tmp_path), fault, str(lost), str(stall)]
        job = free_job()
        for rank in range(tasks):
            words = srun_words(rank, tasks, job) if tasks > 1 else {}
            started.append(start(command, tmp_path, f"log{rank}", words))
        return started

    yield begin
    end(started)


def step_of(folder: Path, rank: int) -> int:
    path = folder / f"rank{rank}"
    return int(path.read_text() or 0) if path.exists() else -1


def said(folder: Path, rank: int) -> str:
    return (folder / f"log{rank}.log").read_text()


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named_and_the_others_end(
    group: Callable[..., Group], tmp_path: Path, victim: int
) -> None:
    members = group(2)
    wait_for(lambda: step_of(tmp_path, 0) > 3, members)
    os.kill(members[victim].pid, signal.SIGKILL)
    survivor = 1 - victim
    assert members[survivor].wait() == HUNG
    assert f"rank {victim}" in said(tmp_path, survivor)
    assert "--resume auto" in said(tmp_path, survivor)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_a_stopped_rank_is_named_and_the_others_end(
    group: Callable[..., Group], tmp_path: Path, victim: int
) -> None:
    members = group(3)
    wait_for(lambda: step_of(tmp_path, 0) > 3, members)
    os.kill(members[victim].pid, signal.SIGSTOP)
    for rank in {0, 1, 2} - {victim}:
        assert members[rank].wait() == HUNG
        assert f"rank {victim}" in said(tmp_path, rank)
    assert members[victim].poll() is None


def test_a_loader_that_stalls_is_named_with_what_each_thread_does(
    group: Callable[..., Group], tmp_path: Path
) -> None:
    members = group(2, "loader", stall=10)
    assert [member.wait() for member in members] == [HUNG, HUNG]
    for rank in (0, 1):
        assert "the loader of rank 1 has delivered no batch" in said(tmp_path, rank)
        assert "for step 3" in said(tmp_path, rank)
    assert "loader_that_hangs_on_its_disk" in said(tmp_path, 1)


@pytest.mark.slow
def test_a_loader_that_stalls_ends_a_single_process_too(
    group: Callable[..., Group], tmp_path: Path
) -> None:
    (member,) = group(1, "loader", stall=10)
    assert member.wait() == HUNG
    assert "the loader has delivered no batch" in said(tmp_path, 0)
    assert "loader_that_hangs_on_its_disk" in said(tmp_path, 0)


@pytest.mark.slow
def test_a_step_that_never_ends_shows_where_each_rank_stands(
    group: Callable[..., Group], tmp_path: Path
) -> None:
    members = group(2, "step", stall=10)
    assert [member.wait() for member in members] == [HUNG, HUNG]
    message = next(line for line in said(tmp_path, 0).splitlines() if line.startswith("error:"))
    first, second = message.split("rank 1 in step 3 at ")
    assert second.startswith("step_that_never_ends")
    assert "rank 0 in step 3 at work" in first


def test_what_fails_on_one_rank_is_told_by_all(group: Callable[..., Group], tmp_path: Path) -> None:
    members = group(2, "error")
    assert members[0].wait() == HUNG
    assert members[1].wait() == 1
    assert "rank 1 failed: OSError: the disk is gone" in said(tmp_path, 0)


@pytest.mark.slow
def test_an_evaluation_that_takes_longer_than_a_step_may_is_waited_for(
    group: Callable[..., Group], tmp_path: Path
) -> None:
    members = group(2, "evaluation", stall=10)
    assert [member.wait() for member in members] == [0, 0], said(tmp_path, 0)
    assert "done" in said(tmp_path, 1)
