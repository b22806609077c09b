"""Small runs of fine-tuning as processes."""

import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path

STEPS_PER_EPOCH = 3  # 24 photos in batches of 8
QUICK = shlex.split(
    "--epochs 4 --warmup-epochs 1 --batch-size 8 --mix-images 4 --lr 1e-3 --lr-batch-size 8"
    " --workers 1 --log-steps 1 --device cpu"
)
_PATIENCE_S = 3000


class Process:
    """A run under way in `folder`."""

    def __init__(self, pid: int, folder: Path, output: Path) -> None:
        self.pid, self.folder, self._output = pid, folder, output

    def said(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def _alive(self) -> bool:
        return Path(f"/proc/{self.pid}/exe").exists()

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds, while the run is under way."""
        deadline = time.monotonic() + _PATIENCE_S
        while not condition():
            assert self._alive(), self.said()[-3000:]
            assert time.monotonic() < deadline, self.said()[-3000:]
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
        deadline = time.monotonic() + _PATIENCE_S
        while self._alive():
            assert time.monotonic() < deadline, self.said()[-3000:]
            time.sleep(0.01)
        status = Path(f"{self._output}.status")
        return int(status.read_text()) if status.exists() else -1
