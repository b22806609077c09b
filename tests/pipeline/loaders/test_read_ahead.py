"""A generator in a thread: as far ahead as allowed, heard when it fails, gone when it is left."""

import threading
import time
from collections.abc import Generator

import pytest

from ibeton.pipeline.loaders.read_ahead import ahead


def counting(
    made: list[int], threads: list[threading.Thread], fails_at: int = -1
) -> Generator[int, None, None]:
    """0 .. 9, also into `made`; at its end the thread it ran in goes into `threads`."""
    try:
        for i in range(10):
            if i == fails_at:
                raise OSError("the disk went away")
            made.append(i)
            yield i
    finally:
        threads.append(threading.current_thread())


def test_items_come_in_order_from_another_thread_that_ends() -> None:
    threads: list[threading.Thread] = []
    for most in (1, 3, 100):
        assert list(ahead(counting([], threads), most)) == list(range(10))
    assert len(threads) == 3
    assert not any(thread.is_alive() for thread in threads)
    assert threading.current_thread() not in threads


def test_no_more_is_made_ahead_than_asked_for() -> None:
    made: list[int] = []
    items = ahead(counting(made, []), 3)
    assert next(items) == 0
    while len(made) < 4:
        time.sleep(0.01)
    time.sleep(0.1)
    assert made == [0, 1, 2, 3]
    items.close()


@pytest.mark.parametrize("forgotten", [False, True])
def test_left_early_it_is_closed_in_its_own_thread(forgotten: bool) -> None:
    threads: list[threading.Thread] = []
    items = ahead(counting([], threads), 2)
    next(items)
    if forgotten:
        del items
    else:
        items.close()
    (thread,) = threads
    assert not thread.is_alive()


def test_an_error_comes_behind_the_items_before_it() -> None:
    threads: list[threading.Thread] = []
    items = ahead(counting([], threads, fails_at=2), 5)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(OSError, match="the disk went away"):
        next(items)
    assert not threads[0].is_alive()
    assert list(items) == []
