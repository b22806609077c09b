"""Checkpoints on disk: written atomically, and refused with a clear message if they do not fit.

A checkpoint of a run holds `student`, `teacher`, `ibot_loss` and the run's `config` (and what the
run needs to continue). One imported from a backbone alone holds a `teacher` without a head, a
`config`, and nothing else.
"""

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ibeton.atomic import replacing
from ibeton.model.checkpoint.backbone_file import read_backbone, refuse_other_files
from ibeton.model.config import ModelConfig
from ibeton.model.ibot import IBOT, build_backbone
from ibeton.options import fill, flag

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
_IMPORT = "turn one of iBOT, DINO or timm into one by ibeton import"
_NUMBERS = ("Float32DType", "Float64DType", "Int32DType", "Int64DType", "BoolDType")
_SCALAR = import_module("numpy._core.multiarray").scalar
_SAFE: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(getattr(np.dtypes, name) for name in _NUMBERS),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]
NETWORKS = ("teacher", "student")
NAMED = 8  # tensors named in one message; the others are counted


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write `content` under `path` in one step: a kill or a full disk leaves what was there.

    Raises OSError, with the temporary file removed.
    """
    with replacing(path) as partial:
        write_through(partial, content)


def write_through(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to the disk itself, not only to its cache. Raises OSError, also for a full
    disk, which torch.save may report as a RuntimeError."""
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
        file.flush()
        os.fsync(file.fileno())


def read_file(path: str | Path) -> dict[str, Any]:
    """What torch.save wrote to `path`, on the CPU. Nothing in the file is executed: besides tensors
    and plain values, only `argparse.Namespace` and NumPy's numbers are allowed, which published
    checkpoints hold. Every record is checked against the CRC-32 that torch.save wrote with it,
    which torch.load does not do. A .safetensors file of this program reads as a checkpoint.

    Raises FileNotFoundError, or ValueError for what is not a whole file of this kind.
    """
    if Path(path).suffix == ".safetensors":
        backbone = read_backbone(path)
        if backbone is None:
            raise ValueError(f"{path} is no checkpoint of ibeton: {_IMPORT}")
        return backbone
    refuse_other_files(Path(path))
    try:
        if zipfile.is_zipfile(path):  # files of torch before 1.6 are not
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"{damaged} fails its checksum")
        with torch.serialization.safe_globals(_SAFE):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may cause any
        # torch's own message advises to load the file with weights_only=False: to run its code.
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} is refused: besides weights it holds a {found[1]}, and loading such"
                " objects may run code; ask for a file of weights alone"
            ) from None
        unpickling = isinstance(error, pickle.UnpicklingError)
        reason = "" if unpickling or not str(error) else f" ({str(error).splitlines()[0]})"
        raise ValueError(f"{path} is no checkpoint, or a damaged one{reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return content


def is_own(content: Mapping[str, Any]) -> bool:
    """Whether this program wrote it."""
    return isinstance(content.get("config"), dict) and "teacher" in content


def read_own(path: str | Path) -> dict[str, Any] | None:
    """A checkpoint of this program, or None for a file of another. Raises as `read_file`."""
    if Path(path).suffix == ".safetensors":
        return read_backbone(path)
    content = read_file(path)
    return content if is_own(content) else None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this program onto the CPU. Nothing in the file is executed.

    Raises FileNotFoundError, or ValueError for a damaged checkpoint or one of another
    program.
    """
    content = read_file(path)
    if not is_own(content):
        missing = sorted({"teacher", "config"} - set(content))
        raise ValueError(
            f"{path} is no checkpoint of ibeton: it lacks {' and '.join(missing) or 'settings'};"
            f" {_IMPORT}"
        )
    return content


def check_same_model(path: str | Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ValueError, naming options and values, if a checkpoint is of another model."""
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


def check_tensors(where: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming them, if tensors of `state` are missing, unknown or of another shape
    than those of `expected`. `where` names the file and the network."""
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    shapes = [
        f"{name} {list(state[name].shape)} (expected {list(tensor.shape)})"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    wrong = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    words = [f"{what}: {listed(names)}" for what, names in wrong if names]
    if words:
        raise ValueError(f"{where} does not fit, and nothing was loaded; {'; '.join(words)}")


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def model_state(ibot: IBOT) -> dict[str, Any]:
    """The model's part of a checkpoint, under the published top-level names."""
    return {
        "student": ibot.student.state_dict(),
        "teacher": ibot.teacher.state_dict(),
        "ibot_loss": ibot.loss.state_dict(),
    }


def restore_model(ibot: IBOT, content: dict[str, Any]) -> None:
    """Load what `model_state` returned: the same tensors, no more and no fewer."""
    ibot.student.load_state_dict(content["student"])
    ibot.teacher.load_state_dict(content["teacher"])
    ibot.loss.load_state_dict(content["ibot_loss"])


def backbone_state(content: Mapping[str, Any], network: str, path: str | Path) -> dict[str, Tensor]:
    """The backbone's tensors of a checkpoint's network, without prefix. Raises ValueError for a
    network that the file lacks."""
    if network not in NETWORKS:
        raise ValueError(f"--network {network}: expected teacher or student")
    if network not in content:
        raise ValueError(
            f"--network {network}: {path} holds one backbone alone, which counts as the teacher's"
        )
    return without_prefix(content[network])


def without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's part of a network's tensors."""
    return {
        name.removeprefix("backbone."): tensor
        for name, tensor in state.items()
        if name.startswith("backbone.")
    }


def load_backbone(path: str | Path, network: str = "teacher") -> tuple[nn.Module, dict[str, Any]]:
    """The backbone of a checkpoint's `network` ("teacher" or "student"), in eval mode on the CPU,
    and the run's settings.

    The backbone takes images float32 [B, 3, H, W], normalized, and returns tokens [B, 1 + N, C],
    the class token first (Swin: the mean of the others), then N patch tokens row by row. Raises as
    `load_checkpoint`, and ValueError for another network or tensors that do not fit the settings.
    """
    return backbone_of(load_checkpoint(path), path, network)


def backbone_of(
    content: Mapping[str, Any], path: str | Path, network: str
) -> tuple[nn.Module, dict[str, Any]]:
    """`load_backbone` of a checkpoint that has been read; `path` names it in errors."""
    state = backbone_state(content, network, path)
    config = fill(ModelConfig, content["config"])
    backbone = build_backbone(config, is_student="masked_embed" in state)
    check_tensors(f"{path}: backbone of {config.arch}", state, backbone.state_dict())
    backbone.load_state_dict(state)
    return backbone.eval(), content["config"]
