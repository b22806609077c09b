"""Run a generator a few steps ahead of its consumer, in a thread that ends with it."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")

_END = object()


def ahead(items: Generator[Item, None, None], most: int) -> Generator[Item, None, None]:
    """The items of a generator, which runs in its own thread, at most `most` items ahead.

    Raises what `items` raises. If it is closed early, it waits for the current item, closes `items`
    in its thread and ends the thread.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="ibeton-ahead")
    waiting: deque[Future[Any]] = deque(thread.submit(next, items, _END) for _ in range(most))
    try:
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(thread.submit(next, items, _END))
            yield item
            del item  # else it stays in memory until the next one arrives
    finally:
        for later in waiting:
            later.cancel()
        thread.submit(items.close)
        thread.shutdown()
