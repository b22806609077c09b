"""What a run writes and shows: log.jsonl, TensorBoard scalars, a progress line."""

import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn

from ibeton.atomic import replacing
from ibeton.progress import plain_console
from ibeton.training.log.progress_line import place_fields, progress_line, step_fields
from ibeton.training.log.trackers import Trackers, numbers

_UNTIMED = 2  # steps at the start, in which things are compiled and allocated
_PLAIN_EVERY_S = 30.0  # between progress lines where there is no terminal
_BAR = 10  # columns of the progress bar
_TIMES = ("ranks", "stage_ms", "loader_ms")  # in milliseconds, by stage


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a log.jsonl one by one, without a last line that a kill cut short, and without
    the times of stages, which take most of the memory."""
    for _, record in _lines(path):
        yield {name: value for name, value in record.items() if name not in _TIMES}


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The whole lines of a log.jsonl, and the record of each."""
    if not path.exists():
        return
    with open(path) as file:
        for line in file:
            try:
                yield line.rstrip("\n") + "\n", json.loads(line)
            except json.JSONDecodeError:
                return


def _in_thread(failed: threading.ExceptHookArgs) -> None:
    """Report an exception of a thread. TensorBoard's writer raises its OSErrors (a full disk, a
    deleted folder) again in the main thread, where they are handled."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _done(record: dict[str, Any]) -> int:
    """Steps done when `record` was written: scores belong between steps, losses to a step."""
    return record["step"] + ("loss" in record)


class RunLog:
    """Writes records with a "step"; on resume, drops those from that step on.

    The log of a run that was killed and resumed reads like that of an unbroken one. `last_step`:
    where this process will end, for the time left, if that is before `total_steps`.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        total_steps: int,
        per_epoch: int,
        last_step: int | None = None,
    ) -> None:
        self.console = plain_console()
        self.trackers = Trackers((), "", folder, {})  # none
        threading.excepthook = _in_thread
        self._path = folder / "log.jsonl"
        self._total, self._per_epoch = total_steps, per_epoch
        self._last = total_steps if last_step is None else last_step
        self._open(first_step)
        self._last_plain, self._unsaid = -_PLAIN_EVERY_S, ""  # the first step is shown at once
        self._progress = Progress(
            TextColumn("{task.fields[text]}", markup=False),
            BarColumn(bar_width=_BAR),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total_steps, text="")
        self._progress.start()

    def _open(self, first_step: int) -> None:
        """Keep the records up to `first_step`, and append from there."""
        from torch.utils.tensorboard import SummaryWriter  # only here: takes seconds

        self._scores: dict[int, float] = {}
        with replacing(self._path) as partial, open(partial, "w") as file:
            for line, record in _lines(self._path):
                if _done(record) <= first_step:
                    file.write(line)
                    self._note_score(record)
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115 - lives as long as self
        board = self._path.with_name("tensorboard")
        self._board = SummaryWriter(str(board), purge_step=first_step)
        self._timed_from, self._timed_since = first_step + _UNTIMED, 0.0

    def roll_back(self, step: int) -> None:
        """Drop all records from `step` on: the run continues from there."""
        self._file.close()
        self._board.close()
        self._open(step)

    def say(self, text: str) -> None:
        """Print a line above the progress line."""
        self.console.print(text, soft_wrap=True)

    def record(self, record: dict[str, Any]) -> None:
        """Append a JSON line; numbers also go to TensorBoard, those of a dict as dict/name. NaN and
        infinity, which JSON lacks, become null."""
        record = {k: None if _not_finite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(record) + "\n")
        self._note_score(record)
        self.trackers.record(record)
        for name, value in numbers(record):
            self._board.add_scalar(name, value, record["step"])

    def progress(self, step: int, numbers: dict[str, float]) -> None:
        """Show the progress after `step` steps, with the numbers of the last one."""
        self._show(step, step_fields(numbers))

    def show(self, step: int, text: str) -> None:
        """Show `text` and the time left; less often if the output is not a terminal."""
        self._show(step, {"loss": text})

    def _show(self, step: int, fields: dict[str, str]) -> None:
        fields = {**fields, **place_fields(step, self._total, self._per_epoch, self._left(step))}
        if self.console.is_terminal:
            text = progress_line(fields, self.console.width - _BAR - 1)
            self._progress.update(self._task, completed=step, text=text)
            return
        self._unsaid = progress_line(fields, 1000)
        if time.monotonic() - self._last_plain > _PLAIN_EVERY_S or step == self._total:
            self.say_progress()

    def _left(self, step: int) -> float | None:
        """Seconds until the end at the pace so far, evaluations included; None in the first steps,
        which compile."""
        now, timed = time.monotonic(), step - self._timed_from
        if timed <= 0:
            self._timed_since = now
            return None
        return (now - self._timed_since) * (self._last - step) / timed

    def say_progress(self) -> None:
        """Where there is no terminal, print the last progress line unless it has been printed."""
        if self._unsaid:
            self._last_plain = time.monotonic()
            self.say(self._unsaid)
            self._unsaid = ""
            sys.stdout.flush()

    def scores(self) -> dict[int, float]:
        """k-NN top-1 in % by the steps done before the evaluation; 0 is the untrained network."""
        return self._scores

    def _note_score(self, record: dict[str, Any]) -> None:
        if "knn_top1" in record:
            self._scores[record["step"]] = record["knn_top1"]

    def close(self) -> None:
        """End the progress line and flush everything."""
        self.say_progress()
        self._progress.stop()
        self.trackers.close()
        self._file.close()
        self._board.close()
