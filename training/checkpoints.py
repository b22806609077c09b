"""The checkpoints of a run folder: the newest, a rolling few before it, and those that stay.

    checkpoint.pt         the newest, there from the first save on
    checkpoint-1.pt       the one before it, and so on to -2, ...: --keep-last in all
    checkpoint0040.pt     after epoch 40, by --keep-every; never removed

Each is written whole under another name first, so a kill or a full disk loses the one that was
being written, and no other.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from ibeton.atomic import sync_folder
from ibeton.model.checkpoint import load_checkpoint, write_through

NEWEST = "checkpoint.pt"
_ROLLING = re.compile(r"checkpoint-(\d+)\.pt")
_KEPT = re.compile(r"checkpoint(\d{4,})\.pt")
_PARTIAL = re.compile(r"\.checkpoint.*\.partial")


def write(folder: Path, content: dict[str, Any], keep_last: int, epoch: int | None = None) -> None:
    """Make `content` the newest checkpoint of `folder`; with `epoch` also one that stays.

    Raises OSError, as on a full disk, with the checkpoints that were there untouched.
    """
    newest = folder / NEWEST
    partial = _partial(folder)
    try:
        write_through(partial, content)
        if newest.exists():
            _step_aside(newest, keep_last)
        os.replace(partial, newest)
        if epoch is not None:
            _put(newest, folder / f"checkpoint{epoch:04d}.pt")
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(folder)


def newest(folder: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest whole checkpoint of `folder`: its path, its content, and a sentence for each that
    is damaged and was passed over. None where there is no checkpoint.

    Raises ValueError where all are damaged.
    """
    damaged: list[str] = []
    for path in listed(folder):
        try:
            return path, load_checkpoint(path), damaged
        except ValueError as error:
            damaged.append(f"passed over: {error}")
    if damaged:
        raise ValueError(f"no checkpoint in {folder} can be read; {'; '.join(damaged)}")
    return None


def listed(folder: Path) -> list[Path]:
    """The checkpoints of `folder` in the order in which a run would go on from them."""
    rolling = _numbered(folder, _ROLLING)
    kept = _numbered(folder, _KEPT)
    newest = [folder / NEWEST] if (folder / NEWEST).exists() else []
    return newest + [rolling[i] for i in sorted(rolling)] + [kept[i] for i in sorted(kept)[::-1]]


def clean(folder: Path) -> None:
    """Remove what a killed process was writing."""
    for path in folder.iterdir():
        if _PARTIAL.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _step_aside(newest: Path, keep_last: int) -> None:
    """Let the newest be the one before the newest too, and so on down the line."""
    rolling = _numbered(newest.parent, _ROLLING)
    for number in sorted(rolling, reverse=True):
        if number >= keep_last - 1:
            rolling[number].unlink()
        else:
            os.replace(rolling[number], newest.with_name(f"checkpoint-{number + 1}.pt"))
    if keep_last > 1:
        _put(newest, newest.with_name("checkpoint-1.pt"))


def _put(source: Path, target: Path) -> None:
    """Give a file a second name: a link, or a copy where the file system has none. `source` keeps
    its name at every moment, as another process may be reading it."""
    partial = _partial(source.parent, "-link")
    try:
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _partial(folder: Path, what: str = "") -> Path:
    return folder / f".{NEWEST}{what}.{os.getpid()}.partial"


def _numbered(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    found = ((pattern.fullmatch(path.name), path) for path in folder.glob("checkpoint*.pt"))
    return {int(match[1]): path for match, path in found if match}
