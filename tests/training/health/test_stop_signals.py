"""A run that is asked to stop finishes its step, saves, and says by its status: resume me."""

import os
import signal
import time
from pathlib import Path

import pytest
from small_runs import PER_EPOCH, Process, Start, losses, records

from ibeton.training.health.stop_signals import INTERRUPTED, STOPPED
from ibeton.training.run_folder import is_held, read_run

SLOW_STEP = """
import time
from ibeton import train
step = train.train_step
def slow(run, *rest):
    print("step", run.step, "begins", flush=True)
    time.sleep({seconds})
    return step(run, *rest)
train.train_step = slow
"""
HELD_STEP = """
import os, time
from ibeton import train
step = train.train_step
def held(run, *rest):
    while run.step > 2 and not os.path.exists({go!r}):
        time.sleep(0.01)
    return step(run, *rest)
train.train_step = held
"""
SLOW_EVALUATION = """
import time
from ibeton.evaluation.frozen import quick
scores = quick.quick_scores
def slow(*arguments):
    print("evaluating", flush=True)
    for _ in range(100_000):  # hours: a run that waited for it would not end here
        time.sleep(0.1)
    return scores(*arguments)
quick.quick_scores = slow
"""


def asked(process: Process, number: signal.Signals, after: int) -> int:
    """Send a signal to the run and its workers, as terminals and SLURM do, when the log shows step
    `after`; the exit status."""
    process.until(lambda: f'"step": {after},' in process.log())
    os.killpg(process.pid, number)
    return process.wait()


@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGTERM],
        pytest.param([signal.SIGHUP, signal.SIGUSR1, signal.SIGINT], marks=pytest.mark.slow),
    ],
)
def test_each_signal_ends_the_run_after_its_step_with_a_checkpoint(
    numbers: list[signal.Signals], start: Start, tmp_path: Path
) -> None:
    folder, begun = tmp_path / "run", [0]
    # The pil loader has worker processes.
    options = ("--resume", "auto", "--loader", "pil", "--epochs", "1000")
    for number in numbers:
        process = start(folder, *options, fault=SLOW_STEP.format(seconds=0.2))
        assert asked(process, number, begun[-1] + 2) == STOPPED, process.said()[-2000:]
        assert f"stopped ({number.name}) at step" in process.said()
        assert "Traceback" not in process.said()
        assert ("resumed at step" in process.said()) == (begun[-1] > 0)
        done = len(losses(folder))
        assert begun[-1] + 3 <= done < 1000 * PER_EPOCH
        assert read_run(folder)["state"] == "stopped"
        assert not is_held(folder)
        begun.append(done)
    last = begun[-1] + 2
    again = start(folder, *options, "--stop-after", str(last))
    assert again.wait() == 0, again.said()[-2000:]
    assert f"resumed at step {begun[-1]} " in again.said()
    assert [r[0] for r in losses(folder)] == list(range(last))
    assert [s["step"] for s in read_run(folder)["starts"]] == begun


def test_what_multiprocessing_runs_beside_the_workers_outlives_slurms_warning(
    start: Start, tmp_path: Path
) -> None:
    """Of the other requests it takes care itself."""
    go = tmp_path / "go"
    process = start(tmp_path / "run", "--loader", "pil", fault=HELD_STEP.format(go=str(go)))
    process.until(lambda: '"step": 1,' in process.log())
    before = helpers_of(process.pid)
    os.killpg(process.pid, signal.SIGUSR1)
    process.until(lambda: "SIGUSR1: the run will finish its step" in process.said())
    time.sleep(0.3)
    after = helpers_of(process.pid)
    go.touch()
    assert process.wait() == STOPPED
    assert len(before) == 2
    assert after == before


def helpers_of(pid: int) -> list[int]:
    """The tracker of resources and the server of forks that run for `pid`."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    names = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
    return [
        int(child)
        for child in children
        if any(name in Path(f"/proc/{child}/cmdline").read_text() for name in names)
    ]


def test_a_second_ctrl_c_ends_the_run_at_once(start: Start, tmp_path: Path) -> None:
    process = start(tmp_path / "run", fault=SLOW_STEP.format(seconds="1e5 if run.step else 0"))
    process.until(lambda: "step 1 begins" in process.said())
    os.killpg(process.pid, signal.SIGINT)
    process.until(lambda: "SIGINT: the run will finish its step" in process.said())
    time.sleep(1.5)  # sooner, it would count as the same press of a key
    assert Path(f"/proc/{process.pid}/exe").exists(), "it waits for its step"
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == INTERRUPTED
    assert "interrupted; " in process.said()
    assert read_run(tmp_path / "run")["state"] == "interrupted"


def test_max_hours_end_a_run_like_a_signal(start: Start, tmp_path: Path) -> None:
    process = start(tmp_path / "run", "--max-hours", "0.0001")
    assert process.wait() == STOPPED
    assert "--max-hours 0.0001 reached" in process.said() or "before the first" in process.said()


def test_sigterm_during_an_evaluation_leaves_it_for_the_next_start(
    start: Start, tmp_path: Path, tiny: Path
) -> None:
    folder = tmp_path / "run"
    options = ["--eval-train", str(tiny), "--eval-val", str(tiny), "--eval-every", "1"]
    options += ["--resume", "auto", "--epochs", "1"]
    finished = start(folder, *options, "--stop-after", "4", fault="")  # scores at step 0
    assert finished.wait() == 0, finished.said()[-2000:]
    process = start(folder, *options, fault=SLOW_EVALUATION)
    process.until(lambda: "evaluating" in process.said())
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == STOPPED, process.said()[-2000:]
    assert len(losses(folder)) == PER_EPOCH
    again = start(folder, *options)
    assert again.wait() == 0, again.said()[-2000:]
    scores = [r for r in records(folder) if "knn_top1" in r]
    assert [r["step"] for r in scores] == [0, PER_EPOCH]
    assert {"head_nmi", "head_ari", "head_acc"} <= set(scores[-1])


CTRL_C_AT_CLOSE = """
import os, signal, time
from ibeton.pipeline import Loader
from ibeton.training.timing.monitor import StepMonitor
def press(self):
    time.sleep(1.1)  # sooner, it would count as the same press
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
def full(self):
    raise OSError(28, "No space left on device", "trace.json.gz")
Loader.close, StepMonitor.close = press, full
"""
WORKERS_LEFT = """
import multiprocessing
from ibeton import train
kill = train.kill_workers
def counted():
    before = len(multiprocessing.active_children())
    kill()
    for worker in multiprocessing.active_children():
        worker.join(60)
    print("workers", before, len(multiprocessing.active_children()), flush=True)
train.kill_workers = counted
"""


def test_what_fails_while_a_run_is_closed_keeps_nothing_else_open(
    start: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    fault = SLOW_STEP.format(seconds=0.4) + CTRL_C_AT_CLOSE + WORKERS_LEFT
    process = start(folder, "--loader", "pil", "--epochs", "1000", fault=fault)
    process.until(lambda: '"step": 1,' in process.log())
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == INTERRUPTED, process.said()[-2000:]
    said = process.said()
    assert "Traceback" not in said
    assert "while the run was closed: trace.json.gz: No space left on device" in said
    assert "workers 1 0" in said
    assert read_run(folder)["state"] == "stopped"
    assert not is_held(folder)
