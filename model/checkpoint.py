"""Checkpoints on disk: written whole or not at all, refused with a clear word where they misfit."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.config import ModelConfig
from model.ibot import IBOT, build_network
from options import fill, flag

# Settings that give tensors their shapes and names.
SHAPE_SETTINGS = (
    "arch",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "qkv_bias",
    "patch_size",
    "image_size",
    "in_chans",
    "layer_scale",
    "mean_pool",
    "out_dim",
    "patch_out_dim",
    "shared_head",
    "shared_head_teacher",
    "norm_last_layer",
    "norm_in_head",
    "hidden_dim",
    "bottleneck_dim",
    "head_layers",
)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write `content` under `path` in one step: a kill or a full disk leaves what was there.

    Raises OSError, with the temporary file removed.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this program onto the CPU. Nothing in the file is executed.

    Raises FileNotFoundError, or ValueError for what is not a whole checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no checkpoint, or a damaged one ({reason})") from error
    missing = {"student", "teacher", "ibot_loss", "config"} - set(content)
    if missing:
        raise ValueError(
            f"{path} is no checkpoint of ibeton: it lacks {', '.join(sorted(missing))}"
        )
    return content


def check_same_model(path: str | Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ValueError, naming options and values, where a checkpoint is of another model."""
    differing = [
        f"{flag(name)} {saved.get(name)} (now {wanted[name]})"
        for name in SHAPE_SETTINGS
        if saved.get(name) != wanted[name]
    ]
    if differing:
        raise ValueError(
            f"checkpoint {path} is of another architecture: {', '.join(differing)};"
            " give the same options or another --output-dir"
        )


def model_state(ibot: IBOT) -> dict[str, Any]:
    """The model's part of a checkpoint, under the published top-level names."""
    return {
        "student": ibot.student.state_dict(),
        "teacher": ibot.teacher.state_dict(),
        "ibot_loss": ibot.loss.state_dict(),
    }


def restore_model(ibot: IBOT, content: dict[str, Any]) -> None:
    """Load what `model_state` gave; every tensor must be there, none may be left over."""
    ibot.student.load_state_dict(content["student"])
    ibot.teacher.load_state_dict(content["teacher"])
    ibot.loss.load_state_dict(content["ibot_loss"])


def load_backbone(path: str | Path, network: str = "teacher") -> tuple[nn.Module, dict[str, Any]]:
    """The backbone of a checkpoint's `network` ("teacher" or "student"), in eval mode on the CPU,
    and the run's settings. Raises as `load_checkpoint`, and ValueError for another network."""
    if network not in ("teacher", "student"):
        raise ValueError(f"--network {network}: expected teacher or student")
    content = load_checkpoint(path)
    whole = build_network(fill(ModelConfig, content["config"]), is_student=network == "student")
    whole.load_state_dict(content[network])
    return whole.backbone.eval(), content["config"]
