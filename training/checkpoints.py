"""The checkpoints of a run folder: the newest, a few before it, and those kept for good.

    checkpoint.pt         the newest, present from the first save on
    checkpoint-1.pt       the one before it, and so on to -2, ...: --keep-last in all
    checkpoint0040.pt     after epoch 40, by --keep-every; never removed
    diverged.pt           the newest saved while the run diverged; nothing resumes from it

Each is written under another name and renamed when complete, so a kill or a full disk loses only
the one being written.
"""

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ibeton.atomic import PARTIAL, partial_name, sync_folder
from ibeton.distributed import from_rank_0
from ibeton.model.checkpoint import load_checkpoint, write_through
from ibeton.training.health.nonfinite_guard import RunError

NEWEST, DIVERGED = "checkpoint.pt", "diverged.pt"
_ROLLING = re.compile(r"checkpoint-(\d+)\.pt")
_KEPT = re.compile(r"checkpoint(\d{4,})\.pt")
# How the temporary names of a run's files begin
_OWN = re.compile(
    r"\.(checkpoint(-\d+|\d{4,})?\.pt|best\.pt|backbone(\d{4,})?\.safetensors|config\.json"
    r"|(run|finetune|scores)\.json|log\.jsonl|curves\.png|trace\.json\.gz|trouble-rank\d+\.json)\."
)


def write(
    folder: Path,
    content: dict[str, Any],
    keep_last: int,
    epoch: int | None = None,
    replace: bool = False,
) -> None:
    """Make `content` the newest checkpoint of `folder`; with `epoch` also one that is kept.

    At least two are kept, because only later steps show whether the newest is usable. `replace`:
    overwrite the newest instead of keeping it as checkpoint-1.pt. Raises RunError, for example on a
    full disk; the checkpoints are then unchanged.
    """
    newest = folder / NEWEST
    partial = partial_name(newest)
    try:
        write_through(partial, content)
        if newest.exists() and not replace:
            _step_aside(newest, max(keep_last, 2))
        os.replace(partial, newest)
        if epoch is not None:
            _put(newest, folder / f"checkpoint{epoch:04d}.pt")
        sync_folder(folder)
    except OSError as error:
        step = content["step"]
        raise RunError(f"no checkpoint could be written at step {step} ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def newest(folder: Path, up_to: int | None = None) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest sound checkpoint of `folder`, of step `up_to` at most: its path, its content, and
    a sentence for each that was skipped because it is damaged or not finite. If there is none, the
    path is None and the content empty.

    Raises ValueError if all are damaged and `up_to` is None.
    """
    damaged: list[str] = []
    for path in listed(folder):
        try:
            content = load_sound(path)
        except ValueError as error:
            damaged.append(f"skipped: {error}")
            continue
        if up_to is None or content.get("step", 0) <= up_to:
            return path, content, damaged
    if damaged and up_to is None:
        raise ValueError(f"no checkpoint in {folder} can be used; {'; '.join(damaged)}")
    return None, {}, damaged


def newest_of_rank_0(
    folder: Path, device: torch.device, up_to: int | None = None
) -> tuple[Path | None, list[str]]:
    """The path of the `newest` checkpoint as rank 0 finds it, or None, and the sentences on damaged
    ones. All ranks must call this."""
    found: tuple[Path | None, list[str]]
    found = from_rank_0(lambda: newest(folder, up_to)[::2], device)  # without the content
    return found


def resume_advice(folder: Path) -> str:
    """From which checkpoint of `folder` `--resume auto` would continue, after reading it."""
    try:
        path, content, _ = newest(folder)
    except (ValueError, OSError) as error:
        return str(error)
    if path is None:
        return f"there is no checkpoint in {folder}: nothing was saved"
    return f"{path} (step {content['step']}) is sound: --resume auto continues from it"


def load_sound(path: Path) -> dict[str, Any]:
    """A checkpoint that is whole and finite. Raises FileNotFoundError, or ValueError naming the
    file and what is wrong with it."""
    content = load_checkpoint(path)
    if name := next(iter(not_finite(content)), ""):
        raise ValueError(f"{path} holds values that are not finite, in {name}")
    return content


def not_finite(content: Any, name: str = "") -> Iterable[str]:
    """Names of the tensors in a checkpoint, or a part of one, that are not finite."""
    if isinstance(content, torch.Tensor):
        if content.is_floating_point() and not bool(content.isfinite().all()):
            yield name
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from not_finite(value, f"{name}.{key}" if name else str(key))


def set_aside(folder: Path, step: int) -> list[str]:
    """Remove checkpoints of steps after `step`, so that `--resume auto` starts from a usable one.
    The newest of them is kept as diverged.pt. Does nothing unless an earlier one remains. Returns
    the names of those removed."""
    line = [path for path in listed(folder) if not _KEPT.fullmatch(path.name)]
    steps = [(path, saved) for path in line if (saved := step_of(path)) is not None]
    later = [path for path, saved in steps if saved > step]
    stay = [path for path, saved in steps if saved <= step]
    if not later or not stay:
        return []
    for path in later[1:]:
        path.unlink()
    os.replace(later[0], folder / DIVERGED)
    if not (folder / NEWEST).exists():
        os.replace(stay[0], folder / NEWEST)
    sync_folder(folder)
    return [path.name for path in later]


def step_of(path: Path) -> int | None:
    """The step of a checkpoint, without reading its tensors; None for a damaged one."""
    try:
        return int(torch.load(path, map_location="meta", mmap=True, weights_only=True)["step"])
    except Exception:  # whatever is raised, the file is damaged
        return None


def listed(folder: Path) -> list[Path]:
    """The checkpoints of `folder`, in the order in which a run would resume from them."""
    rolling = _numbered(folder, _ROLLING)
    kept = _numbered(folder, _KEPT)
    newest = [folder / NEWEST] if (folder / NEWEST).exists() else []
    return newest + [rolling[i] for i in sorted(rolling)] + [kept[i] for i in sorted(kept)[::-1]]


def clean(folder: Path) -> None:
    """Remove files of a run that a killed process left half written; not those of an export, which
    may be under way."""
    for path in folder.iterdir():
        if PARTIAL.fullmatch(path.name) and _OWN.match(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def _step_aside(newest: Path, keep_last: int) -> None:
    """Shift the rolling checkpoints by one: checkpoint.pt to checkpoint-1.pt, and so on."""
    rolling = _numbered(newest.parent, _ROLLING)
    for number in sorted(rolling, reverse=True):
        if number >= keep_last - 1:
            rolling[number].unlink()
        else:
            os.replace(rolling[number], newest.with_name(f"checkpoint-{number + 1}.pt"))
    try:
        os.link(newest, newest.with_name("checkpoint-1.pt"))  # never missing, as it may be read
    except OSError:  # a file system without links, on which a copy would need more space
        os.replace(newest, newest.with_name("checkpoint-1.pt"))


def _put(source: Path, target: Path) -> None:
    """Link `target` to `source`, or copy it if the file system has no links. `source` is never
    missing meanwhile, as another process may be reading it."""
    partial = partial_name(target)
    try:
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _numbered(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    found = ((pattern.fullmatch(path.name), path) for path in folder.glob("checkpoint*.pt"))
    return {int(match[1]): path for match, path in found if match}
