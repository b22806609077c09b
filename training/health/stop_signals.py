"""Requests to stop a run: it finishes its step, saves a checkpoint and exits.

SIGTERM, SIGHUP (a closed terminal), SIGUSR1 (SLURM's warning before the time limit), the first
Ctrl-C and --max-hours are requests. A second Ctrl-C ends the run at once.
"""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

STOPPED = 85  # exit status: stopped on request, continue with --resume auto
INTERRUPTED = 130  # exit status of a second Ctrl-C, as shells have it
REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_SAME_PRESS_S = 1.0  # a terminal and a launcher may both deliver one Ctrl-C
_LONGEST_TMPDIR = 70  # a socket's path has 107 bytes, of which multiprocessing uses up to 35
_HEARD = "\n{}: the run will finish its step and save; Ctrl-C (again) ends it at once\n"


class StopRequested(BaseException):
    """Raised by a request inside `StopSignals.interruptible`. Not an Exception, so that no error
    handler catches it."""


class StopSignals:
    """Handles requests while entered, in the main thread. `reason` names the request; "" if there
    was none."""

    def __init__(self) -> None:
        self.reason = ""
        self._heard = 0.0
        self._leave = False
        self._begun, self._max_hours = time.monotonic(), 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in REQUESTS:
                by_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
                if not by_nohup:
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def limit(self, max_hours: float) -> None:
        """Stop this many hours after construction; 0 is no limit."""
        self._max_hours = max_hours

    def requested(self) -> bool:
        """Whether this process has been asked to stop, or has reached --max-hours."""
        hours = (time.monotonic() - self._begun) / 3600
        if not self.reason and 0 < self._max_hours < hours:
            self.reason = f"--max-hours {self._max_hours:g} reached"
        return bool(self.reason)

    def requested_on_any_rank(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; the same answer on all. A collective: all ranks must
        call it, and wait for each other here."""
        if not dist.is_initialized():
            return self.requested()
        flag = torch.tensor(float(self.requested()), device=device)
        dist.all_reduce(flag)
        return bool(flag > 0)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A request raises StopRequested anywhere in this block."""
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
            with suppress(OSError):  # a terminal that is closed
                os.write(2, _HEARD.format(self.reason).encode())
        if self._leave:
            self._leave = False
            raise StopRequested


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started in this block, and their children, ignore requests: the run handles them
    and needs its workers to finish the step."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, set(REQUESTS))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def block_signals_in_workers() -> None:
    """Start multiprocessing's fork server and resource tracker now, with stop signals blocked, so
    that the loader's workers inherit that. Raises ValueError if TMPDIR is too long for the fork
    server's socket."""
    folder = tempfile.gettempdir()
    if len(folder) > _LONGEST_TMPDIR:
        raise ValueError(
            f"TMPDIR {folder} is too long for the sockets of worker processes: set it to a path of"
            f" at most {_LONGEST_TMPDIR} characters, such as TMPDIR=/tmp"
        )
    with signals_blocked():  # by itself, the tracker would unblock two of them when it starts
        resource_tracker.ensure_running()
    with signals_blocked():
        forkserver.ensure_running()
