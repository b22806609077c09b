"""Work a few steps ahead of who waits for it, in a thread that ends with its consumer."""

import threading
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")


@dataclass
class _End:
    """The last thing that the thread says."""

    error: BaseException | None = None


def ahead(items: Generator[Item, None, None], most: int) -> Generator[Item, None, None]:
    """The items of a generator, which runs in a thread of its own, at most `most` items ahead.

    Raises what `items` raises. Left early (closed, or no longer referred to), it waits for the item
    under way, closes `items` in its thread and ends the thread.
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
            del item  # or it would stay in memory until the next one is there
        if item.error is not None:
            raise item.error
    finally:
        left.set()
        room.release()
        thread.join()
