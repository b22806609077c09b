"""Worker processes: results in the order of the jobs, a few at a time, deaths always noticed.

Each worker has its own pipe, which closes when the worker dies. `ProcessPoolExecutor` has one queue
for all workers: if one is killed while it writes, the parent waits forever.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
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

from ibeton.command import Failure

_PR_SET_PDEATHSIG = 1  # sys/prctl.h
_SPINS = "1000"  # what libgomp takes itself where it has more threads than cores

Job = TypeVar("Job")
Result = TypeVar("Result")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stop_with_launcher() -> None:
    """Have the kernel ask this process to stop when torchrun, its parent, dies: torchrun cannot do
    so itself after a SIGKILL. Does nothing without torchrun, and in worker processes. To be called
    before imports that take seconds."""
    of_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and multiprocessing.parent_process() is None
    if of_torchrun and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def before_torch() -> None:
    """What a program does before it imports torch: `stop_with_launcher`, and let OpenMP's threads
    sleep soon when they wait for each other. By default they spin, 300,000 times with libgomp. If a
    loader thread or another process needs the core, neither makes progress. Values set by the user
    are kept."""
    stop_with_launcher()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def end_with_parent(*_: object) -> None:
    """End this worker process as soon as the process that asked for it is gone, even by SIGKILL.

    `multiprocessing` alone does not: its fork server waits for its workers and they wait for it.
    The parent holds one end of a pipe, which the kernel closes. (As `worker_init_fn` of a
    DataLoader it is given the worker's number.)
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="ibeton-parent", daemon=True).start()


def in_order(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int
) -> Generator[Result, None, None]:
    """Run `function(job)` in `workers` processes and yield the results in the order of `jobs`.

    At most two jobs per worker are running or queued. Close the iterator (contextlib.closing) to
    stop early. Raises Failure when a worker dies, and whatever `function` raises.
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


def in_threads(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int, most: int
) -> Generator[Result, None, None]:
    """Run `function(job)` in `workers` threads and yield the results in the order of `jobs`, of
    which at most `most` are running, queued or waiting to be yielded. Close the iterator to stop
    early. Raises whatever `function` raises."""
    threads = ThreadPoolExecutor(workers, thread_name_prefix="ibeton")
    waiting: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            waiting.append(threads.submit(function, job))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """A process that runs `function`, and this end of its pipe."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")  # inherits no threads and no locks
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(function, theirs), daemon=True)
        resource_tracker.ensure_running()  # or the first start would, and unblock Ctrl-C
        with interrupts_held_back():
            self.process.start()
        theirs.close()  # now only the worker has it: its death closes the pipe

    def run(self, job: Any) -> Any:
        try:
            self._pipe.send(job)
            result, error = self._pipe.recv()
        except (EOFError, OSError):
            raise Failure(
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
    """Delay Ctrl-C and SIGTERM to the end of the block: a half-started worker would die with its
    own traceback. Workers started in the block ignore Ctrl-C, which is for the parent to handle."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited
    handlers, came = {}, []
    if threading.current_thread() is threading.main_thread():  # it handles all signals
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
    end_with_parent()
    warnings.simplefilter("ignore")  # Pillow's, about photos
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
