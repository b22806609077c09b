"""Signs of life between ranks, over a connection to the store that is used for nothing else."""

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
    """Leaves this rank's sign of life in the store each BEAT_S, and reads those of all.

    What a rank says is compared with what it said before, at this rank's clock: clocks of machines
    need not agree. The thread may hang in a network that is cut; then `answered` stays behind.
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
            except RuntimeError:  # the store is gone: `answered` tells
                time.sleep(BEAT_S)
            if last:
                return
            self._closed.wait(BEAT_S)

    def _exchange(self, sign: Sign) -> None:
        """One beat, and the others' last ones."""
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
        """Seconds since rank `rank` said something new; 0 for one that has left in good order."""
        return 0.0 if self.signs[rank].get("left") else time.monotonic() - self._heard[rank]

    def forgive(self) -> None:
        """Count silence from now on: it was this rank that did not listen."""
        self._heard = [time.monotonic()] * len(self._heard)
        self.answered = time.monotonic()

    def post(self, verdict: str, patience: float) -> None:
        """Tell all ranks why the group ends, unless one has told before; gives up, where the store
        does not answer, after `patience` seconds."""
        self._to_post = verdict
        deadline = time.monotonic() + patience
        while not self.verdict and time.monotonic() < deadline:
            time.sleep(BEAT_S / 10)

    def close(self) -> None:
        """Say that this rank leaves, and end the thread, unless it hangs."""
        self._closed.set()
        self._thread.join(3 * BEAT_S)
