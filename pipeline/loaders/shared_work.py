"""Threads that share jobs: each takes parts one by one and moves to the next job without waiting.

No thread waits for the slowest at the end of a job, and results still come in the order of the
jobs. The number of jobs that are open is bounded, so that their memory can be reused.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass
class Job:
    """Work in parts: `left` of them are not finished."""

    left: int


SomeJob = TypeVar("SomeJob", bound=Job)
Worker = Callable[[SomeJob], int]
MakeWorker = Callable[[], AbstractContextManager[Worker[SomeJob]]]


def share(
    jobs: Iterator[SomeJob],
    workers: Sequence[MakeWorker[SomeJob]],
    most: int,
) -> Generator[SomeJob, None, None]:
    """Yield `jobs` in order, each when all of its parts are finished.

    Each of `workers` is entered in a thread of its own and gives the function that works: called
    with a job, it takes parts until none is left for it and returns how many it finished. At most
    `most` jobs are open at a time, the yielded one included, which ends when the next is asked for.

    Raises what `jobs` or a worker raises. Closing the generator ends the threads.
    """
    state = _State(jobs, most)
    threads = [
        threading.Thread(
            target=_serve, args=(state, worker), name=f"ibeton-photos-{i}", daemon=True
        )
        for i, worker in enumerate(workers)
    ]
    try:
        for thread in threads:
            thread.start()
        while (job := state.finished()) is not None:
            yield job
            del job
            state.release()
    finally:
        state.stop()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def _serve(state: "_State[SomeJob]", worker: MakeWorker[SomeJob]) -> None:
    try:
        number = 0
        with worker() as work:
            while (taken := state.take(number)) is not None:
                number, job = taken
                state.finish(job, work(job))
                number += 1
    except BaseException as error:  # whatever it was, the consumer must hear of it
        state.fail(error)


class _State(Generic[SomeJob]):
    """The open jobs, oldest first; every method may be called from any thread."""

    def __init__(self, jobs: Iterator[SomeJob], most: int) -> None:
        self._source, self._most = jobs, most
        self._open: deque[SomeJob] = deque()
        self._first = 0  # number of the oldest open job
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def take(self, number: int) -> tuple[int, SomeJob] | None:
        """The first open job from `number` on; opens one if there is room, else waits. None where
        there is nothing left to do."""
        with self._changed:
            while not self._stopped and self._error is None:
                number = max(number, self._first)
                if number < self._first + len(self._open):
                    return number, self._open[number - self._first]
                if self._ended:
                    return None
                if len(self._open) < self._most:
                    self._open_next()
                else:
                    self._changed.wait()
            return None

    def _open_next(self) -> None:
        job = next(self._source, None)
        if job is None:
            self._ended = True
        else:
            self._open.append(job)
        self._changed.notify_all()

    def finish(self, job: SomeJob, parts: int) -> None:
        with self._changed:
            job.left -= parts
            if not job.left:
                self._changed.notify_all()

    def finished(self) -> SomeJob | None:
        """Wait for the oldest job; None after the last."""
        with self._changed:
            while self._error is None:
                if self._open and not self._open[0].left:
                    return self._open[0]
                if self._ended and not self._open:
                    return None
                self._changed.wait()
            raise self._error

    def release(self) -> None:
        """The oldest job is no longer needed."""
        with self._changed:
            self._open.popleft()
            self._first += 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
