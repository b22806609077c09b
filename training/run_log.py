"""What a run leaves and shows: log.jsonl, TensorBoard scalars, a progress line."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch.utils.tensorboard import SummaryWriter

_PLAIN_EVERY_S = 30.0  # between progress lines where there is no terminal


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a log.jsonl; a last line cut short by a kill is left out."""
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _done(record: dict[str, Any]) -> int:
    """Steps done when `record` was written: a score stands between steps, a loss is of a step."""
    return record["step"] + ("loss" in record)


class RunLog:
    """Writes records with a "step" as they come; on resume, forgets those from that step on.

    So the log of a run that was killed and went on reads like that of an unbroken one.
    """

    def __init__(self, folder: Path, first_step: int, total_steps: int, per_epoch: int) -> None:
        self.console = Console(stderr=False, highlight=False)
        self._path = folder / "log.jsonl"
        self._total, self._per_epoch = total_steps, per_epoch
        self._open(first_step)
        self._last_plain = time.monotonic()
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total} [bold]{task.fields[text]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total_steps, epoch=0, text="")
        self._progress.start()

    def _open(self, first_step: int) -> None:
        """Keep what was written up to `first_step`, and write on from there."""
        kept = [r for r in read_records(self._path) if _done(r) <= first_step]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(r) + "\n" for r in kept))
        os.replace(partial, self._path)
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115 - lives as long as self
        board = self._path.with_name("tensorboard")
        self._board = SummaryWriter(str(board), purge_step=first_step)
        self._started, self._first = time.monotonic(), first_step

    def roll_back(self, step: int) -> None:
        """Forget all from `step` on: the run goes on from there."""
        self._file.close()
        self._board.close()
        self._open(step)

    def say(self, text: str) -> None:
        """One line for the person watching, above the progress line."""
        self.console.print(text, soft_wrap=True)

    def record(self, record: dict[str, Any]) -> None:
        """Append one JSON line; numbers also go to TensorBoard, those of a dict as dict/name. What
        is not finite is written as null: JSON has no word for it."""
        record = {k: None if _not_finite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if isinstance(value, dict):
                for part, number in value.items():
                    self._board.add_scalar(f"{name}/{part}", number, record["step"])
            elif name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, record["step"])

    def progress(self, step: int, numbers: dict[str, float]) -> None:
        """Show where the run stands after `step` steps, with the numbers of the step before."""
        left = (time.monotonic() - self._started) * (self._total - step) / (step - self._first)
        terms = [f"{name} {numbers[name]:.3f}" for name in ("cls", "patch") if name in numbers]
        text = (
            f"loss {numbers['loss']:.3f}"
            + (f" ({' '.join(terms)})" if terms else "")
            + f"  {numbers['images_per_s']:.1f} images/s  data wait {numbers['data_wait']:.0%}"
            + (f"  {numbers['peak_share']:.0%} of peak" if "peak_share" in numbers else "")
            + f"  {numbers['memory_gib']:.1f} GiB  ETA {_clock(left)}"
        )
        epoch = (step - 1) // self._per_epoch + 1
        if self.console.is_terminal:
            self._progress.update(self._task, completed=step, epoch=epoch, text=text)
        elif time.monotonic() - self._last_plain > _PLAIN_EVERY_S or step == self._total:
            self._last_plain = time.monotonic()
            self.say(f"epoch {epoch}  step {step}/{self._total}  {text}")
            sys.stdout.flush()

    def scores(self) -> dict[int, float]:
        """k-NN top-1 in % by the steps done before the evaluation; 0 is the untrained network."""
        records = read_records(self._path)
        return {r["step"]: r["knn_top1"] for r in records if "knn_top1" in r}

    def close(self) -> None:
        """End the progress line and flush everything."""
        self._progress.stop()
        self._file.close()
        self._board.close()


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours < 48 else f"{hours / 24:.1f} days"
