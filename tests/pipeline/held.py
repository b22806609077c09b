"""What this process holds: to see that it holds no more after something than before."""

import gc
import time
from pathlib import Path

Held = tuple[int, int, int]


def held() -> Held:
    """Threads, open files and child processes."""
    gc.collect()
    this = Path("/proc/self")
    children = (this / "task").glob("*/children")
    return (
        len(list((this / "task").iterdir())),
        len(list((this / "fd").iterdir())),
        sum(len(path.read_text().split()) for path in children),
    )


def wait_for_no_more_than(before: Held) -> None:
    """Threads and processes that were waited for leave /proc a moment later. A test that waits here
    until its limit of time has failed."""
    while any(now > then for now, then in zip(held(), before, strict=True)):
        time.sleep(0.01)
