"""Real worker processes: order, errors, early ends, and deaths that must not go unnoticed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing

import pytest
from paths import ROOT

from ibeton.workers import in_order, interrupts_held_back

DIES_AT = 5


def slower_when_even(job: int) -> tuple[int, int]:
    time.sleep(0.02 * (job % 2 == 0))
    return job, os.getpid()


def fails_at_three(job: int) -> int:
    if job == 3:
        raise ValueError("three is no good")
    return job


def dies(job: int) -> int:
    if job == DIES_AT:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def dies_while_it_answers(job: int) -> bytes:
    """So large an answer is still on its way when the timer strikes."""
    if job == DIES_AT:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return bytes(1 << 28)
    return b"small"


DEATH_SIGNAL = """
import ctypes, os, sys
import {module}
signal = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(signal))  # PR_GET_PDEATHSIG
print(signal.value, "torch" in sys.modules, os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("under", "spins"),
    [
        ({}, "1000"),
        ({"TORCHELASTIC_RUN_ID": "a", "GOMP_SPINCOUNT": "7"}, "7"),
        ({"TORCHELASTIC_RUN_ID": "a", "OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_an_evaluation_ends_with_torchrun_and_spins_briefly_from_before_it_imports_torch(
    under: dict[str, str], spins: str
) -> None:
    program = [sys.executable, "-c", DEATH_SIGNAL.format(module="ibeton.evaluation")]
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"PYTHONPATH": str(ROOT), **under}
    said = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    ends = int(signal.SIGTERM) if "TORCHELASTIC_RUN_ID" in under else 0
    assert said.stdout.split() == [str(ends), "False", spins]


def test_results_come_in_the_order_of_the_jobs_from_all_workers() -> None:
    results = list(in_order(slower_when_even, range(30), workers=2))
    assert [job for job, _ in results] == list(range(30))
    assert len({pid for _, pid in results}) == 2
    assert multiprocessing.active_children() == []


def test_jobs_are_taken_a_few_at_a_time() -> None:
    taken: list[int] = []
    jobs = (taken.append(i) or i for i in range(1000))
    with closing(in_order(fails_at_three, jobs, workers=2)) as results:
        assert next(results) == 0
        assert len(taken) == 4
    assert multiprocessing.active_children() == []  # left early: ended


def test_what_the_function_raises_is_raised_here() -> None:
    results = in_order(fails_at_three, range(10), workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three is no good"):
        next(results)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("function", [dies, dies_while_it_answers])
def test_a_dead_worker_is_an_error_not_a_hang(function: Callable[[int], object]) -> None:
    with pytest.raises(RuntimeError, match="a worker process died"):
        list(in_order(function, range(50), workers=2))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_acted_upon_once_a_worker_has_started(sign: signal.Signals) -> None:
    """Also one that reaches a thread which does not hold it back."""
    heard: list[int] = []
    before = signal.signal(sign, lambda number, frame: heard.append(number))
    arrived, arrives = os.pipe()
    os.set_blocking(arrives, False)
    signal.set_wakeup_fd(arrives)
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    try:
        with interrupts_held_back():
            signal.pthread_kill(other.ident or 0, sign)
            assert os.read(arrived, 1) == bytes([sign]), "Python has it"
            time.sleep(0.1)
            assert heard == []
        assert heard == [sign]
    finally:
        over.set()
        signal.set_wakeup_fd(-1)
        signal.signal(sign, before)
        os.close(arrived)
        os.close(arrives)
