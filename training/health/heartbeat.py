"""Heartbeats between ranks, over a store connection of their own."""

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from ibeton.distributed import VERDICT, beat_key, connect

BEAT_S = 1.0
_HOST = socket.gethostname()
Sign = dict[str, Any]


class Heartbeat:
    """Writes this rank's heartbeat to the store every BEAT_S and reads those of all ranks.

    Silence is measured with this rank's clock, so clocks of machines need not agree. If the network
    is down the thread may hang; then `answered`, the time of the last exchange, stops advancing.
    """

    def __init__(self, rank: int, world_size: int, sign: Callable[[], Sign]) -> None:
        self._rank, self._sign = rank, sign
        self._store = connect(rank)
        self._keys = [beat_key(r) for r in range(world_size)]
        self._said = [""] * world_size
        self._heard = [time.monotonic()] * world_size
        self.signs: list[Sign] = [{} for _ in range(world_size)]
        self.answered = time.monotonic()
        self.verdict = ""
        self._to_post = ""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ibeton-heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        beat = 0
        while True:
            beat, last = beat + 1, self._closed.is_set()
            try:
                self._exchange({"beat": beat, "host": _HOST, "left": last, **self._sign()})
            except RuntimeError:  # the store is gone: `answered` shows it
                time.sleep(BEAT_S)
            if last:
                return
            self._closed.wait(BEAT_S)

    def _exchange(self, sign: Sign) -> None:
        """Write this rank's heartbeat, read those of the others and the verdict."""
        self._store.set(self._keys[self._rank], json.dumps(sign))
        if self._to_post:
            self._store.compare_set(VERDICT, "", self._to_post)
        *said, verdict = (v.decode() for v in self._store.multi_get([*self._keys, VERDICT]))
        now = time.monotonic()
        for rank, value in enumerate(said):
            if value != self._said[rank]:
                self._said[rank], self._heard[rank] = value, now
                self.signs[rank] = json.loads(value)
        self.answered, self.verdict = now, verdict

    def silence(self, rank: int) -> float:
        """Seconds since the last new heartbeat of `rank`; 0 if it has signed off."""
        return 0.0 if self.signs[rank].get("left") else time.monotonic() - self._heard[rank]

    def forgive(self) -> None:
        """Restart the count of silence, after this process was stopped itself."""
        self._heard = [time.monotonic()] * len(self._heard)
        self.answered = time.monotonic()

    def post(self, verdict: str, patience: float) -> None:
        """Tell all ranks why the group ends; the first verdict holds. Gives up after `patience`
        seconds if the store does not answer."""
        self._to_post = verdict
        deadline = time.monotonic() + patience
        while not self.verdict and time.monotonic() < deadline:
            time.sleep(BEAT_S / 10)

    def close(self) -> None:
        """Sign off and stop the thread, unless it hangs."""
        self._closed.set()
        self._thread.join(3 * BEAT_S)
