"""Weights of others: the layouts of iBOT, DINO and timm, turned into checkpoints of this program.

Layouts (published code, `tests/reference/checkpoint_inventory.json`):
- iBOT, full: `student` (names behind `module.`), `teacher`, `ibot_loss`, `args` and more.
- DINO, full: the same with `dino_loss`; its head has no patch prototypes, so the backbone is taken.
- a backbone alone: names at the top (DINO) or under `state_dict` (iBOT), bare or behind `module.`
  and `backbone.`; or timm's names, also in a .safetensors file.

The architecture follows from names and shapes. A tensor that is missing, unknown or of another
shape is refused by name.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibeton.model.checkpoint.files import (
    NETWORKS,
    backbone_state,
    check_tensors,
    is_own,
    read_file,
    without_prefix,
)
from ibeton.model.checkpoint.shapes import infer_backbone, infer_head
from ibeton.model.config import ModelConfig
from ibeton.model.ibot import IBOT, build_backbone, build_network
from ibeton.model.loss import IBOTLoss

State = dict[str, Tensor]
CLASSIFIERS = ("head.", "fc.")  # what may stand behind a backbone, and is no part of it


@dataclass(frozen=True)
class Foreign:
    """What another program's file holds."""

    layout: str
    content: dict[str, Any]  # what `save_checkpoint` takes
    unused: list[str]  # names of tensors and entries that were left behind


def read_foreign(path: str | Path, network: str = "teacher", num_heads: int = 0) -> Foreign:
    """Read a checkpoint of iBOT, DINO or timm.

    `network` chooses the backbone where there are two and no iBOT head. `num_heads` must be given
    for a ViT of no published width and depth, unless the file tells. Raises FileNotFoundError, or
    ValueError for a file or tensor that does not fit: nothing is loaded in part.
    """
    if network not in NETWORKS:
        raise ValueError(f"--network {network}: expected teacher or student")
    raw, settings = _read(path)
    if num_heads:
        settings["num_heads"] = num_heads
    if "ibot_loss" in raw:
        return _whole(path, raw, settings)
    if "student" in raw or "teacher" in raw:
        layout = "DINO checkpoint" if "dino_loss" in raw else "student and teacher"
        state = _tensors(path, raw, network)
        others = [name for name in raw if name != network]
    else:
        layout = "backbone"
        nested = "state_dict" in raw
        state = _tensors(path, raw, "state_dict") if nested else _tensors(path, {"": raw}, "")
        others = [name for name in raw if name != "state_dict"] if nested else []
    return _backbone(path, state, settings, layout, others)


def load_weights_into(ibot: IBOT, path: str | Path, network: str = "teacher") -> list[str]:
    """Start student and teacher from the backbone of a checkpoint: of this program, or any that
    `read_foreign` reads. Heads stay as they are.

    Returns the names of what stays fresh in the student's backbone: `masked_embed`, where the file
    has none. Raises ValueError, naming the tensors, for a backbone of another architecture.
    """
    content = _content_of(path, network)
    state = backbone_state(content, network if network in content else "teacher", path)
    if "student" in content:
        state |= {"masked_embed": content["student"]["backbone.masked_embed"]}
    expected = ibot.student.backbone.state_dict()
    fresh = {name: expected[name] for name in ("masked_embed",) if name not in state}
    check_tensors(f"{path}: the backbone", state | fresh, expected)
    ibot.student.backbone.load_state_dict(state | fresh)
    state.pop("masked_embed", None)
    ibot.teacher.backbone.load_state_dict(state)
    return list(fresh)


def _content_of(path: str | Path, network: str) -> dict[str, Any]:
    if Path(path).suffix != ".safetensors":
        content = read_file(path)
        if is_own(content):
            return content
    return read_foreign(path, network).content


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The file's entries, and the settings that it tells of itself."""
    if Path(path).suffix != ".safetensors":
        content = read_file(path)
        if is_own(content):
            raise ValueError(f"{path} is a checkpoint of ibeton already: there is nothing to do")
        arguments = content.get("args")
        return content, dict(vars(arguments)) if hasattr(arguments, "__dict__") else {}
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        with safe_open(path, "pt") as file:
            settings = {k: int(v) for k, v in (file.metadata() or {}).items() if v.isdecimal()}
            return {name: file.get_tensor(name) for name in file.keys()}, settings  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one ({error})") from error


def _tensors(path: str | Path, raw: Mapping[str, Any], entry: str) -> State:
    """The state dict under `entry`, names without the prefix that DistributedDataParallel gives."""
    what = f"its {entry}" if entry else "it"
    if entry not in raw:
        raise ValueError(f"{path} has no {entry}: it holds {', '.join(map(str, raw))}")
    state = raw[entry]
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path} is no checkpoint that can be read: {what} holds no tensors")
    strange = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(
            f"{path} is no checkpoint that can be read: {what} holds, beside tensors, {strange[0]}"
        )
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _whole(path: str | Path, raw: dict[str, Any], settings: dict[str, Any]) -> Foreign:
    """A full checkpoint of iBOT: both networks with their heads, and the centers."""
    parts = {name: _tensors(path, raw, name) for name in ("student", "teacher", "ibot_loss")}
    found = infer_backbone(path, without_prefix(parts["student"]), settings)
    found |= infer_head(path, parts["student"], parts["teacher"], settings)
    config = ModelConfig(**found)
    config.check()
    with torch.device("meta"):
        student = build_network(config, is_student=True).state_dict()
        teacher = build_network(config, is_student=False).state_dict()
        loss = IBOTLoss(config).state_dict()
    for name, expected in (("student", student), ("teacher", teacher), ("ibot_loss", loss)):
        check_tensors(f"{path}: {name} of {config.arch}", parts[name], expected)
    unused = [name for name in raw if name not in parts]
    return Foreign("iBOT checkpoint", {**parts, "config": asdict(config)}, unused)


def _backbone(
    path: str | Path, state: State, settings: dict[str, Any], layout: str, others: list[str]
) -> Foreign:
    """A backbone alone; a head behind it is left, and named, as it belongs to another task."""
    heads = [name for name in state if name.startswith(CLASSIFIERS)]
    state = {
        name.removeprefix("backbone."): tensor
        for name, tensor in state.items()
        if name not in heads
    }
    state = _from_timm(state)
    config = ModelConfig(**infer_backbone(path, state, settings))
    config.check()
    with torch.device("meta"):
        expected = build_backbone(config, is_student="masked_embed" in state).state_dict()
    tables = {k for k in expected if k.endswith("relative_position_index") and k not in state}
    if tables:  # timm does not save them: they follow from the window alone
        built = build_backbone(config, is_student=False).state_dict()
        state |= {name: built[name] for name in tables}
    check_tensors(f"{path}: backbone of {config.arch}", state, expected)
    teacher = {f"backbone.{name}": state[name] for name in expected}  # in our order
    return Foreign(layout, {"teacher": teacher, "config": asdict(config)}, heads + others)


def _from_timm(state: State) -> State:
    """timm's names -> ours; others stay. timm merges tokens at a stage's start, we at its end."""
    shifted = "layers.1.downsample.reduction.weight" in state and not any(
        name.startswith("layers.0.downsample.") for name in state
    )
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        if shifted and ".downsample." in name:
            stage, rest = name.removeprefix("layers.").split(".", 1)
            name = f"layers.{int(stage) - 1}.{rest}"
        renamed[name] = tensor
    return renamed
