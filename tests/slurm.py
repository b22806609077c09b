"""What srun tells its tasks, for real processes without a SLURM, and how to leave none behind."""

import contextlib
import fcntl
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from paths import ROOT

FIRST_PORT, PORT_STEP = 20_000, 16  # job ids share no port: the program's own rule


_TAKEN: set[int] = set()  # by this process, which holds a lock on a byte for each
_LOCKS = os.open(f"{tempfile.gettempdir()}/ibeton-test-jobs-{os.getuid()}", os.O_CREAT | os.O_RDWR)


def free_job() -> int:
    """A job id whose port is free here, and which no other process of tests is given."""
    jobs = [job for job in range(625) if job not in _TAKEN]
    random.SystemRandom().shuffle(jobs)
    for job in jobs:
        try:
            fcntl.lockf(_LOCKS, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, job)
            with socket.socket() as one:
                one.bind(("", FIRST_PORT + PORT_STEP * job))
        except OSError:
            continue
        _TAKEN.add(job)
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


def wait_for(condition: Callable[[], bool], processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until `condition` holds; fails if one of the processes ends before."""
    while not condition():
        if any(process.poll() is not None for process in processes):
            assert condition(), "it did not come to that"
            return
        time.sleep(0.05)
