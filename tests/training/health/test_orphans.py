"""No process is left behind when another one is killed, whichever it is."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT
from small_runs import Start

SLOW_STEP = """
import time
from ibeton import train
step = train.train_step
def slow(run, *rest):
    time.sleep(0.5)
    return step(run, *rest)
train.train_step = slow
"""
POOL = """
import time
from ibeton.workers import in_order
def sleep(job):
    print("begun", flush=True)
    time.sleep(1000)
if __name__ == "__main__":
    list(in_order(sleep, range(2), 2))
"""


def stat_of(pid: int) -> tuple[int, str, str] | None:
    """Parent, state and start time of a process; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), fields[0], fields[19]


def descendants(pid: int) -> dict[int, str]:
    """All processes below `pid`: their start times, by which they are told from later ones."""
    parents = {int(p.name): stat_of(int(p.name)) for p in Path("/proc").glob("[0-9]*")}
    found: dict[int, str] = {}
    below = {pid}
    while below:
        below = {child for child, stat in parents.items() if stat and stat[0] in below} - set(found)
        found |= {child: (parents[child] or (0, "", ""))[2] for child in below}
    return found


def named(pids: dict[int, str], name: str) -> list[int]:
    return [p for p in pids if name in Path(f"/proc/{p}/cmdline").read_text()]


def assert_all_end(pids: dict[int, str]) -> None:
    """Within minutes, on any machine; they stayed for ever."""
    deadline = time.monotonic() + 150
    left = pids
    while left:
        left = {
            p: t for p, t in left.items() if (s := stat_of(p)) and s[2] == t and s[1] not in "ZX"
        }
        assert time.monotonic() < deadline, {
            p: Path(f"/proc/{p}/cmdline").read_text() for p in left
        }
        time.sleep(0.05)


@pytest.mark.parametrize("victim", ["main", "forkserver", "worker"])
def test_no_process_of_a_run_outlives_another_that_is_killed(
    victim: str, start: Start, tmp_path: Path
) -> None:
    options = ("--loader", "pil", "--workers", "2", "--epochs", "100")
    process = start(tmp_path / "run", *options, fault=SLOW_STEP)
    process.until(lambda: '"step": 1,' in process.log())
    below = descendants(process.pid)
    server = named(below, "multiprocessing.forkserver")[0]
    workers = [pid for pid in below if (stat_of(pid) or (0,))[0] == server]
    assert len(workers) == 2
    killed = {"main": process.pid, "forkserver": server, "worker": workers[0]}[victim]
    os.kill(killed, signal.SIGKILL)
    if victim == "worker":
        assert process.wait() == 1, process.said()[-2000:]
        assert "a worker process of the pil loader was killed" in process.said()
        assert "Traceback" not in process.said(), process.said()[-3000:]
    process.wait()
    assert_all_end(below)


def test_a_pool_ends_with_its_parent(tmp_path: Path) -> None:
    """While its workers are in the middle of a long job."""
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline() == b"begun\n"
    below = descendants(process.pid)
    assert len(below) >= 2
    process.kill()
    process.wait()
    process.stdout.close()
    assert_all_end(below)
