"""Ends a run that hangs because a rank died or stalled, or because a loader delivers no batch.

A thread checks every second what this rank is doing and, over the heartbeat, what the other ranks
are doing. If something takes too long, every rank prints which rank and where, and exits with
status HUNG. The main thread cannot do this: it is stuck in a call that does not return.
"""

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from ibeton.distributed import address, serves_store
from ibeton.training.health.heartbeat import BEAT_S, Heartbeat, Sign

HUNG = 86  # exit status of a run that the watchdog ended
_GRACE_S = 10.0  # for the main thread to exit by itself after the verdict
_SURE_S = 5.0  # of silence prove a rank dead once a collective has failed
_LIMITED = ("batch", "step", "rest")  # activities with a timeout
_TORCH = str(Path(torch.__file__).parent)
_HINT = "--resume auto continues from the last checkpoint, if there is one"

Item = TypeVar("Item")


class Watchdog:
    """The watchdog of one rank. `lost_after`: seconds without a heartbeat until a rank counts as
    lost. `stall_after`: seconds that a step, or the wait for its batch, may take; `no_timeout`
    suspends that limit."""

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
        """Iterate over `batches`, the first of which is for step `step`. Time spent fetching a
        batch counts for the loader, the rest for the step."""
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
        """No rank counts as stalled while any rank is in this block. Dead ranks are still
        noticed."""
        before = self._doing
        self._doing = (what, before[1], time.monotonic())
        try:
            yield
        finally:
            self._doing = (*before[:2], time.monotonic())

    @contextmanager
    def report_errors(self) -> Iterator[None]:
        """Tell the other ranks about an exception raised in this block, so that they exit too. If a
        collective failed, name the rank that is gone instead, and exit."""
        try:
            yield
        except Exception as error:
            if self._beats is not None:
                if _is_collective(error) and (lost := self._look_for_lost(self._beats)):
                    self._end(lost)
                text = f"rank {self._rank} failed: {type(error).__name__}: {error}"
                self._beats.post(text, 3 * BEAT_S)
                self._linger()
            raise

    def close(self) -> None:
        """Stop the threads and sign off."""
        self._closed.set()
        if self._beats is not None:
            self._beats.close()
        self._thread.join()

    def _sign(self) -> Sign:
        what, step, since = self._doing
        spent = round(time.monotonic() - since, 1)
        return {"doing": what, "step": step, "for": spent, "at": self._place()}

    def _place(self) -> str:
        """The innermost frame of the main thread outside torch."""
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
            if now - self._looked > _SURE_S:  # this process was stopped: do not blame others
                self._doing = (*self._doing[:2], now)
                if self._beats is not None:
                    self._beats.forgive()
            self._looked = now
            if self._beats is not None:
                self._heed(self._beats)
            if message := self._stalled():
                self._end(message)

    def _heed(self, beats: Heartbeat) -> None:
        """Exit if a rank is lost, or if some rank has posted a verdict."""
        if beats.verdict:
            self._condemned = self._condemned or time.monotonic()
            if time.monotonic() - self._condemned > _GRACE_S:
                self._end(beats.verdict)
        elif lost := self._lost(beats, self._lost_after):
            self._end(lost)

    def _lost(self, beats: Heartbeat, after: float) -> str:
        """Which ranks have been silent for `after` seconds, in a sentence; "" for none."""
        unanswered = time.monotonic() - beats.answered
        if unanswered > after:
            host, port = address()
            whose = "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "rank 0"
            return (
                f"rank {self._rank} has had no answer from {whose} at {host}:{port} for"
                f" {unanswered:.0f} s: it died or was stopped, or the network is down"
            )
        lost = [r for r in range(self._world_size) if beats.silence(r) > after + unanswered]
        if not lost:
            return ""
        silence = min(beats.silence(r) for r in lost)
        named = ", ".join(f"rank {r} ({beats.signs[r].get('host', 'unknown host')})" for r in lost)
        return f"{named} sent no heartbeat for {silence:.0f} s: killed, stopped or disconnected"

    def _look_for_lost(self, beats: Heartbeat) -> str:
        """After a failed collective: which rank is gone, or why another rank failed."""
        deadline = time.monotonic() + self._lost_after
        while time.monotonic() < deadline:
            if beats.verdict:
                return beats.verdict
            if lost := self._lost(beats, _SURE_S):
                return lost
            time.sleep(BEAT_S / 10)
        return ""

    def _stalled(self) -> str:
        """What has exceeded `stall_after` on this rank, in a sentence; "" for nothing."""
        what, step, since = self._doing
        spent = time.monotonic() - since
        if what not in _LIMITED or spent < self._stall_after:
            return ""
        signs = self._beats.signs if self._beats is not None else []
        if any(sign.get("doing") not in _LIMITED for sign in signs):
            return ""
        if what == "batch":
            loader = f"the loader of rank {self._rank}" if signs else "the loader"
            return f"{loader} has delivered no batch for {spent:.0f} s, for step {step}"
        if signs and spent < 1.1 * self._stall_after + 3 * BEAT_S:
            return ""  # a rank that waits for its loader reports first
        places = "; ".join(
            f"rank {r} in step {s['step']} at {s['at']}" for r, s in enumerate(signs)
        )
        return f"step {step} has run for {spent:.0f} s" + (f": {places}" if places else "")

    def _end(self, message: str) -> typing.NoReturn:
        """Tell the other ranks and the user, print all stacks, and exit at once."""
        if self._beats is not None:
            self._beats.post(message, 3 * BEAT_S)
        # Straight to the file: the main thread might hold the stream's lock.
        os.write(sys.stderr.fileno(), f"error: {message}\n{_HINT}\n".encode())
        faulthandler.dump_traceback(sys.stderr.fileno())
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(1.0)
        for child in multiprocessing.active_children():
            child.kill()
        self._linger()
        os._exit(HUNG)

    def _linger(self) -> None:
        """Keep the store open until the others have read it once more."""
        if serves_store(self._rank) and self._world_size > 1:
            time.sleep(3 * BEAT_S)


def _is_collective(error: Exception) -> bool:
    """Whether a collective failed. gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )
