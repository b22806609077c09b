"""Small runs of training commands as processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from slurm import FIRST_PORT, PORT_STEP, free_job


class Process:
    """A run under way in `folder`."""

    def __init__(self, pid: int, folder: Path, output: Path) -> None:
        self.pid, self.folder, self._output = pid, folder, output

    def said(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def _alive(self) -> bool:
        return Path(f"/proc/{self.pid}/exe").exists()

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; fails if the run ends before."""
        while not condition():
            if not self._alive():
                assert condition(), self.said()[-3000:]  # it may have ended since
                return
            time.sleep(0.002)

    def until_step(self, step: int) -> None:
        """Wait until the log shows `step`."""
        log = self.folder / "log.jsonl"
        self.until(lambda: log.exists() and f'"step": {step},' in log.read_text())

    def kill(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        while self._alive():
            time.sleep(0.002)

    def wait(self) -> int:
        """The exit status; -1 where it was killed."""
        status = Path(f"{self._output}.status")
        while not status.exists() and self._alive():  # another process may get its number later
            time.sleep(0.01)
        return int(status.read_text()) if status.exists() else -1


class Forker:
    """A process that has imported the command of `module`, and forks a run of it at a time."""

    def __init__(self, module: str, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("run_forker.py")), module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(
        self,
        folder: Path,
        arguments: list[str],
        environment: dict[str, str] | None = None,
        fault: str = "",
    ) -> Process:
        """Begin a run in `folder`, which the arguments name; `fault` is Python that it runs first,
        as `small_runs.HOLD`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._count += 1
        output = self._folder / f"{self._count}.said"
        job = {"arguments": arguments, "output": str(output), "environment": environment or {}}
        job["fault"] = fault
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Process(int(self._process.stdout.readline()), folder, output)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def two_ranks() -> list[dict[str, str]]:
    """The environments of two processes that work together."""
    port = FIRST_PORT + PORT_STEP * free_job()  # not one that the system gives to others meanwhile
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**group, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
