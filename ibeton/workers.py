"""Work in processes: results in the order of the jobs, few at a time, and no death unnoticed.

Each worker has a pipe of its own, which ends when it dies. The queue that all workers of a
`ProcessPoolExecutor` share does not: killed in mid-message, a worker there leaves the parent
reading for ever.
"""

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int
) -> Generator[Result, None, None]:
    """Run `function(job)` in `workers` processes and yield the results in the order of `jobs`.

    At most two jobs a worker are under way or waiting to be taken. Close the iterator
    (contextlib.closing) to stop early. Raises RuntimeError when a worker dies, and what `function`
    raises.
    """
    team: list[_Worker] = []
    idle: SimpleQueue[_Worker] = SimpleQueue()

    def run(job: Job) -> Result:
        worker = idle.get()
        try:
            return worker.run(job)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(workers)  # each waits for one process
    waiting: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            if len(team) < workers:
                team.append(_Worker(function))
                idle.put(team[-1])
            waiting.append(threads.submit(run, job))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for worker in team:
            worker.process.terminate()
        threads.shutdown(wait=True, cancel_futures=True)
        for worker in team:
            worker.close()


class _Worker:
    """A process that runs `function`, and this end of its pipe."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")  # nothing inherited: no threads, no locks
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(function, theirs), daemon=True)
        resource_tracker.ensure_running()  # the first start would do so, and let Ctrl-C through
        with interrupts_held_back():
            self.process.start()
        theirs.close()  # the worker's is now the only one, so its death ends the pipe

    def run(self, job: Any) -> Any:
        try:
            self._pipe.send(job)
            result, error = self._pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError(
                "a worker process died (killed, or out of memory: try fewer --workers)"
            ) from None
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        self.process.join()
        self._pipe.close()


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Act on Ctrl-C and SIGTERM only at the end of the block: a worker that was half started would
    die with a traceback of its own. One that is born here never hears of Ctrl-C, which is for the
    parent to act upon."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited
    handlers, came = {}, []
    if threading.current_thread() is threading.main_thread():  # which hears what other threads get
        for sign in (signal.SIGINT, signal.SIGTERM):
            handlers[sign] = signal.signal(sign, lambda *heard: came.append(heard))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for sign, handler in handlers.items():
            signal.signal(sign, handler)
        for sign, _ in came:
            signal.raise_signal(sign)


def _work(function: Callable[[Any], Any], pipe: Connection) -> None:
    """Serve jobs until the parent closes the pipe or is gone."""
    warnings.simplefilter("ignore")  # Pillow's remarks on photos
    try:
        while True:
            job = pipe.recv()
            answer: tuple[Any, Exception | None]
            try:
                answer = function(job), None
            except Exception as error:
                answer = None, error
            pipe.send(answer)
    except (EOFError, ConnectionError):
        return
