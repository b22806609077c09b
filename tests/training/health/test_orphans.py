"""No process is left behind when another one is killed, whichever it is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import ROOT
from small_runs import SMALL, Start, losses

from ibeton.pipeline.loaders import LOADERS

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
    return [p for p in pids if name in command_of(p)]


def command_of(pid: int) -> str:
    """Its command line; "" once it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["ffcv", "dali"])
def test_threads_leave_no_process_behind(loader: str, start: Start, tmp_path: Path) -> None:
    if problem := LOADERS[loader].problem():
        pytest.skip(problem)
    options = ("--loader", loader, "--workers", "2", "--epochs", "100")
    process = start(tmp_path / "run", *options, fault=SLOW_STEP)
    process.until(lambda: '"step": 1,' in process.log())
    below = descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for_the_end_of(below)


def wait_for_the_end_of(pids: dict[int, str]) -> None:
    """Measured: within 6 s. A test that waits here until its limit of time has failed."""
    left = pids
    while left:
        left = {
            p: t for p, t in left.items() if (s := stat_of(p)) and s[2] == t and s[1] not in "ZX"
        }
        time.sleep(0.05)


def torchrun(
    data: Path, folder: Path, loader: str, *options: str, restarts: int = 0
) -> subprocess.Popen[bytes]:
    """Two ranks of an endless run; what they say goes to FOLDER.said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "--max-restarts", str(restarts)]
    command += [str(ROOT / "train.py"), *SMALL, "--loader", loader]
    command += ["--data", str(data), "--output-dir", str(folder), "--epochs", "5000", *options]
    with open(folder.with_suffix(".said"), "w") as said:
        return subprocess.Popen(
            command,
            stdout=said,
            stderr=said,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def wait_for(holds: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not holds():
        assert process.poll() is None
        time.sleep(0.02)


def test_ranks_end_with_torchrun_from_their_first_second_on(tiny: Path, tmp_path: Path) -> None:
    """While they import torch, and would look for torchrun's store minutes later."""
    process = torchrun(tiny, tmp_path / "run", "auto")
    below: dict[int, str] = {}
    try:
        wait_for(lambda: len(ranks_that_import(process.pid)) == 2, process)
        below = descendants(process.pid)
    finally:
        process.kill()
        process.wait()
    wait_for_the_end_of(below)


def ranks_that_import(torchrun: int) -> list[int]:
    """Children that run train.py and have loaded its first library."""
    ranks = named(descendants(torchrun), "train.py")
    own = [pid for pid in ranks if "torch.distributed.run" not in command_of(pid)]
    return [pid for pid in own if "libtorch" in mapped_by(pid)]


def mapped_by(pid: int) -> str:
    """The files that it has mapped; "" once it is gone."""
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again_and_the_run_continues(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ("--resume", "auto", "--save-steps", "2", "--stop-after", "400")
    process = torchrun(tiny, folder, "pil", *options, restarts=1)
    log = folder / "log.jsonl"
    try:
        wait_for(lambda: log.exists() and '"step": 5,' in log.read_text(), process)
        below = descendants(process.pid)
        ranks = [pid for pid in below if (stat_of(pid) or (0,))[0] == process.pid]
        os.kill(ranks[1], signal.SIGKILL)
        assert process.wait() == 0, folder.with_suffix(".said").read_text()[-3000:]
    finally:
        process.kill()
    assert [r[0] for r in losses(folder)] == list(range(400))
    assert "resumed at step" in folder.with_suffix(".said").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["torchrun", "rank"])
@pytest.mark.parametrize("loader", ["pil", "ffcv", "dali"])
def test_no_process_outlives_torchrun_or_a_rank_that_is_killed(
    victim: str, loader: str, tiny: Path, tmp_path: Path
) -> None:
    if problem := LOADERS[loader].problem():
        pytest.skip(problem)
    process = torchrun(tiny, tmp_path / "run", loader)
    log = tmp_path / "run" / "log.jsonl"
    below: dict[int, str] = {}
    try:
        wait_for(lambda: log.exists() and '"step": 1,' in log.read_text(), process)
        below = descendants(process.pid)
        ranks = [pid for pid in below if (stat_of(pid) or (0,))[0] == process.pid]
        assert len(ranks) == 2
        os.kill(process.pid if victim == "torchrun" else ranks[1], signal.SIGKILL)
        assert process.wait(500) != 0
    finally:
        process.kill()
    wait_for_the_end_of(below)


@pytest.mark.parametrize(
    "victim",
    ["main", *(pytest.param(one, marks=pytest.mark.slow) for one in ("worker", "forkserver"))],
)
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
        assert "a worker process of the loader was killed" in process.said()
        assert "Traceback" not in process.said(), process.said()[-3000:]
    process.wait()
    wait_for_the_end_of(below)


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
    wait_for_the_end_of(below)
