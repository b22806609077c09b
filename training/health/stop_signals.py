"""How a run is asked to stop, and how it stops: after the step, with a checkpoint.

SIGTERM, SIGUSR1 (SLURM's warning before the time is up), the first Ctrl-C and --max-hours are
requests. A second Ctrl-C ends the run at once.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

STOPPED = 85  # exit status: stopped on request, go on with --resume auto
INTERRUPTED = 130  # exit status of a second Ctrl-C, as shells have it
REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SAME_PRESS_S = 1.0  # a terminal and a launcher may both pass on one Ctrl-C
_HEARD = "\n{}: the run will finish its step and save; Ctrl-C (again) ends it at once\n"


class StopRequested(BaseException):
    """Raised by a request in the midst of what may be left undone; no error, so that no one who
    handles errors takes it for one."""


class StopSignals:
    """Hears requests while it is entered, in the main thread. `reason` says what asked, and is
    empty until then."""

    def __init__(self) -> None:
        self.reason = ""
        self._heard = 0.0
        self._leave = False
        self._begun, self._max_hours = time.monotonic(), 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in REQUESTS}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def limit(self, max_hours: float) -> None:
        """Stop after so many hours from construction; 0 is no limit."""
        self._max_hours = max_hours

    def requested(self) -> bool:
        """Whether this process has been asked to stop, or its time is up."""
        hours = (time.monotonic() - self._begun) / 3600
        if not self.reason and 0 < self._max_hours < hours:
            self.reason = f"--max-hours {self._max_hours:g} are over"
        return bool(self.reason)

    def requested_on_any_rank(self, device: torch.device) -> bool:
        """Whether any rank is to stop: the same answer on all of them, who must all ask, and who
        wait for each other here."""
        if not dist.is_initialized():
            return self.requested()
        flag = torch.tensor(float(self.requested()), device=device)
        dist.all_reduce(flag)
        return bool(flag > 0)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """What runs in it may be left at any moment: a request raises StopRequested there."""
        try:
            self._leave = True
            yield
        finally:
            self._leave = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.reason and now - self._heard > _SAME_PRESS_S:
            raise KeyboardInterrupt
        if not self.reason:
            self.reason, self._heard = signal.Signals(number).name, now
            os.write(2, _HEARD.format(self.reason).encode())
        if self._leave:
            self._leave = False
            raise StopRequested


@contextmanager
def unheard() -> Iterator[None]:
    """Processes that are started in this block, and theirs, never hear of a request: it is for the
    run to act upon, and it needs its workers until the step is done."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, set(REQUESTS))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def block_signals_in_workers() -> None:
    """Start now, deaf to requests, the process from which multiprocessing forks the loader's, and
    the tracker of their semaphores."""
    with unheard():  # by itself the tracker is deaf to two of them, whose mask its start undoes
        resource_tracker.ensure_running()
    with unheard():
        forkserver.ensure_running()
