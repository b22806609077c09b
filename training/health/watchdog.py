"""Ends a run that hangs: a rank that died or stalled, a loader that gives no batch.

A thread looks each second at what this rank does, and, over the heartbeat, at what the others do.
If something stalls for too long, every rank says what and who, and ends the process
with status HUNG: the training's own thread cannot, as it stands in a call that does not return.
"""

import multiprocessing
import os
import sys
import threading
import time
import traceback
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from ibeton.distributed import address, serves_store
from ibeton.training.health.heartbeat import BEAT_S, Heartbeat, Sign

HUNG = 86  # exit status of a run that was ended here
_GRACE_S = 10.0  # for the main thread to end by itself, once the group has its verdict
_SURE_S = 5.0  # of silence: enough, where a failed exchange proves that someone is gone
_LIMITED = ("batch", "step", "rest")  # what counts as stalled when it takes too long
_FRAMES = 8  # of each thread's stack, the innermost
_TORCH = str(Path(torch.__file__).parent)
_HINT = "--resume auto continues from the last checkpoint, if there is one"

Item = TypeVar("Item")


class Watchdog:
    """Of one rank. `lost_after`: seconds without a sign of life from a rank; `stall_after`: seconds
    that a step, or the wait for its batch, may take. What `patient` surrounds may take its time.
    """

    def __init__(self, rank: int, world_size: int, lost_after: float, stall_after: float) -> None:
        self._rank, self._world_size = rank, world_size
        self._lost_after, self._stall_after = lost_after, stall_after
        self._main = threading.get_ident()
        self._doing: tuple[str, int, float] = ("start", 0, time.monotonic())
        self._looked = time.monotonic()
        self._condemned = 0.0  # when this rank read the verdict
        self._closed = threading.Event()
        self._beats = Heartbeat(rank, world_size, self._sign) if world_size > 1 else None
        self._thread = threading.Thread(target=self._watch, name="ibeton-watchdog", daemon=True)
        self._thread.start()

    def batches(self, batches: Iterator[Item], step: int) -> Iterator[Item]:
        """The batches, of which the first is that of step `step`. From one to the next, the time
        is the loader's while it is asked, then the step's."""
        try:
            while True:
                self._doing = ("batch", step, time.monotonic())
                batch = next(batches, None)
                if batch is None:
                    return
                self._doing = ("step", step, time.monotonic())
                yield batch
                step += 1
        finally:
            self._doing = ("rest", step, time.monotonic())

    @contextmanager
    def no_timeout(self, what: str) -> Iterator[None]:
        """No rank counts as stalled while one is in here; one that dies is noticed all the same."""
        before = self._doing
        self._doing = (what, before[1], time.monotonic())
        try:
            yield
        finally:
            self._doing = (*before[:2], time.monotonic())

    @contextmanager
    def report_errors(self) -> Iterator[None]:
        """The other ranks hear of what is raised in it, and end too. Where an exchange with them
        failed, the rank that is gone is looked for; then this one ends."""
        try:
            yield
        except Exception as error:
            if self._beats is not None:
                if _is_exchange(error) and (lost := self._look_for_lost(self._beats)):
                    self._end(lost)
                text = f"rank {self._rank} failed: {type(error).__name__}: {error}"
                self._beats.post(text, 3 * BEAT_S)
                self._linger()
            raise

    def close(self) -> None:
        """End the threads; this rank leaves in good order."""
        self._closed.set()
        if self._beats is not None:
            self._beats.close()
        self._thread.join()

    def _sign(self) -> Sign:
        what, step, since = self._doing
        spent = round(time.monotonic() - since, 1)
        return {"doing": what, "step": step, "for": spent, "at": self._place()}

    def _place(self) -> str:
        """Where the main thread is: its innermost frame outside torch."""
        frame = sys._current_frames().get(self._main)
        while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
            frame = frame.f_back
        if frame is None:
            return "?"
        code = frame.f_code
        return f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"

    def _watch(self) -> None:
        while not self._closed.wait(BEAT_S):
            now = time.monotonic()
            if now - self._looked > _SURE_S:  # this process was held: no one else is to blame
                self._doing = (*self._doing[:2], now)
                if self._beats is not None:
                    self._beats.forgive()
            self._looked = now
            if self._beats is not None:
                self._heed(self._beats)
            if message := self._stalled():
                self._end(message)

    def _heed(self, beats: Heartbeat) -> None:
        """End if a rank is lost, or if one has said why all must end."""
        if beats.verdict:
            self._condemned = self._condemned or time.monotonic()
            if time.monotonic() - self._condemned > _GRACE_S:
                self._end(beats.verdict)
        elif lost := self._lost(beats, self._lost_after):
            self._end(lost)

    def _lost(self, beats: Heartbeat, after: float) -> str:
        """Who has been silent for `after` seconds; empty where all are heard."""
        unanswered = time.monotonic() - beats.answered
        if unanswered > after:
            host, port = address()
            whose = "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "rank 0"
            return (
                f"rank {self._rank} has had no answer from {whose} at {host}:{port} for"
                f" {unanswered:.0f} s: it is gone or stopped, or the network between is cut"
            )
        lost = [r for r in range(self._world_size) if beats.silence(r) > after + unanswered]
        if not lost:
            return ""
        silence = min(beats.silence(r) for r in lost)
        named = ", ".join(f"rank {r} ({beats.signs[r].get('host', 'unknown host')})" for r in lost)
        return f"{named} gave no sign of life for {silence:.0f} s: killed, stopped, or cut off"

    def _look_for_lost(self, beats: Heartbeat) -> str:
        """After a failed exchange: the rank that is gone, or why another rank failed."""
        deadline = time.monotonic() + self._lost_after
        while time.monotonic() < deadline:
            if beats.verdict:
                return beats.verdict
            if lost := self._lost(beats, _SURE_S):
                return lost
            time.sleep(BEAT_S / 10)
        return ""

    def _stalled(self) -> str:
        """What has stalled here for too long; empty if nothing has."""
        what, step, since = self._doing
        spent = time.monotonic() - since
        if what not in _LIMITED or spent < self._stall_after:
            return ""
        signs = self._beats.signs if self._beats is not None else []
        if any(sign.get("doing") not in _LIMITED for sign in signs):
            return ""
        stacks = f"\n{thread_stacks()}"
        if what == "batch":
            who = f"the loader of rank {self._rank} has" if signs else "the loader has"
            return f"{who} given no batch for {spent:.0f} s, for step {step}{stacks}"
        if not signs:
            return f"step {step} has not ended for {spent:.0f} s{stacks}"
        if spent < 1.1 * self._stall_after + 3 * BEAT_S:  # first those who know that it is they
            return ""
        places = "; ".join(
            f"rank {rank} in step {sign['step']} at {sign['at']}" for rank, sign in enumerate(signs)
        )
        return f"step {step} has not ended for {spent:.0f} s: {places}{stacks}"

    def _end(self, message: str) -> typing.NoReturn:
        """Tell the others, then the user, and leave at once, whatever the main thread does."""
        if self._beats is not None:
            self._beats.post(message, 3 * BEAT_S)
        told = f"error: {message}\n{_HINT}\n"
        os.write(sys.stderr.fileno(), told.encode())  # no lock that the main thread might hold
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(1.0)
        for child in multiprocessing.active_children():
            child.kill()
        self._linger()
        os._exit(HUNG)

    def _linger(self) -> None:
        """The store must outlive the others' last look at it."""
        if serves_store(self._rank) and self._world_size > 1:
            time.sleep(3 * BEAT_S)


def _is_exchange(error: Exception) -> bool:
    """Whether a collective failed; gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def thread_stacks() -> str:
    """What each thread does, innermost call last, and in what state worker processes are."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        lines.append(f"thread {names.get(ident, ident)}:")
        for place in traceback.extract_stack(frame)[-_FRAMES:]:
            lines.append(f"  {place.filename}:{place.lineno} {place.name}: {place.line}")
    for child in multiprocessing.active_children():
        lines.append(f"worker process {child.pid}: {_state(child.pid)}")
    return "\n".join(lines)


def _state(pid: int | None) -> str:
    """The kernel's word for it: R (running), S (sleeping), D (waiting for a disk), T (stopped)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "unknown"
    return next(
        (
            line.split(":", 1)[1].strip()
            for line in status.splitlines()
            if line.startswith("State:")
        ),
        "unknown",
    )
