"""What a command is doing: a line at start-up, then a bar on a terminal, lines elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_LINE_EVERY_S = 30.0


def announce(what: str) -> None:
    """Say what is being done, on the first process of a group; not where only help is wanted."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank == "0" and not {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{what} ...", file=sys.stderr, flush=True)


def plain_console(**settings: Any) -> "Console":
    """A console that prints text as it is: what a user named, [/final] say, may look like markup.
    All output by rich goes through one of these."""
    from rich.console import Console  # only here: takes a while

    return Console(markup=False, highlight=False, **settings)


@contextmanager
def progress(what: str, total: int, unit: str = "photos") -> Iterator[Callable[[int], None]]:
    """Show progress over `total` photos, or other units, on stderr; yields `advance(count)`."""
    if sys.stderr.isatty():
        with _bar(what, total, unit) as advance:
            yield advance
    else:
        yield _lines(what, total, unit)


@contextmanager
def _bar(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    from rich import progress as bars
    from rich.text import Text

    class Rate(bars.ProgressColumn):
        def render(self, task: bars.Task) -> Text:
            return Text(f"{task.speed or 0:.0f} {unit}/s")

    place = bars.TextColumn(what, markup=False), bars.BarColumn(), bars.MofNCompleteColumn()
    columns = *place, Rate(), bars.TimeRemainingColumn()
    with bars.Progress(*columns, console=plain_console(stderr=True)) as shown:
        task = shown.add_task(what, total=total)
        yield lambda count: shown.advance(task, count)


def _lines(what: str, total: int, unit: str) -> Callable[[int], None]:
    started = said = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal said, done
        done += count
        now = time.monotonic()
        if now - said >= _LINE_EVERY_S:
            said, rate = now, done / (now - started)
            left = (total - done) / rate
            print(
                f"{what} {done:,} of {total:,} {unit}, {rate:.0f} {unit}/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    return advance
