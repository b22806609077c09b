"""Run a generator a few steps ahead of its consumer, in a thread that ends with it."""

import threading
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")


@dataclass
class _End:
    """The last thing that the thread sends."""

    error: BaseException | None = None


def ahead(items: Generator[Item, None, None], most: int) -> Generator[Item, None, None]:
    """The items of a generator, which runs in its own thread, at most `most` items ahead.

    Raises what `items` raises. If it is closed early, it waits for the current item, closes `items`
    in its thread and ends the thread.
    """
    room = threading.Semaphore(most)
    ready: SimpleQueue[tuple[Item] | _End] = SimpleQueue()
    left = threading.Event()

    def work() -> None:
        end = _End()
        try:
            with closing(items):
                while room.acquire() and not left.is_set():
                    ready.put((next(items),))
        except StopIteration:
            pass
        except BaseException as error:  # whatever it was, the consumer must hear of it
            end.error = error
        finally:
            ready.put(end)

    thread = threading.Thread(target=work, name="ibeton-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            room.release()
            yield item[0]
            del item  # else it stays in memory until the next one arrives
        if item.error is not None:
            raise item.error
    finally:
        left.set()
        room.release()
        thread.join()
