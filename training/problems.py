"""Problems that a user can cause and solve, each as one sentence instead of a traceback."""

import os
from pathlib import Path

import numpy as np
import torch

from ibeton import command
from ibeton.pipeline.store.decode import UnreadablePhoto
from ibeton.pipeline.store.photos import Photos

_PROBES = 16  # photos of which one must be readable


def check_output_dir(folder: Path, option: str = "--output-dir") -> None:
    """Raise ValueError unless `folder` is, or can become, a folder that can be written."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{option} {folder}: {there} is a file; give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {folder}: {there} cannot be written; give another folder")


def check_readable(photos: Photos, data: str) -> None:
    """Raise ValueError if none of some photos, spread over the set, can be decoded; `data` is what
    to call it."""
    reason = ""
    for index in np.unique(np.linspace(0, len(photos) - 1, _PROBES).astype(int)).tolist():
        try:
            photos.pixels(index)
            return
        except UnreadablePhoto as error:
            reason = reason or f"{photos.name(index)}: {error}"
    raise ValueError(f"{data}: no photo in it can be read ({reason})")


def explain(error: Exception) -> str:
    """What went wrong, in a sentence, if it is something that a user can cause; "" for a bug."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU has too little memory for a step: give a smaller --batch-size, more"
            " --micro-steps, or --checkpoint-blocks"
        )
    return command.explain(error)
