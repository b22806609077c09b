"""What srun tells its tasks, for real processes without a SLURM, and how to leave none behind."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from paths import ROOT

FIRST_PORT, PORT_STEP = 20_000, 16  # job ids share no port: the program's own rule


def free_job() -> int:
    """A job id whose port is free here. Tests that run at the same time begin at random places."""
    first = random.SystemRandom().randrange(625)
    for job in (*range(first, 625), *range(first)):
        with socket.socket() as one:
            try:
                one.bind(("", FIRST_PORT + PORT_STEP * job))
            except OSError:
                continue
            return job
    raise RuntimeError("no free port")


def srun_words(rank: int, tasks: int, job: int) -> dict[str, str]:
    """The environment of task `rank` of `tasks`, all on this machine."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NODELIST": "localhost",
    }


def start(
    command: Sequence[str], folder: Path, name: str, words: dict[str, str]
) -> subprocess.Popen[bytes]:
    """A process in a session of its own, whose output goes to FOLDER/NAME.log."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
    environ = {**own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **words}
    with open(folder / f"{name}.log", "wb") as log:
        return subprocess.Popen(
            command, env=environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill what is left of their sessions."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Callable[[], bool], seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)
