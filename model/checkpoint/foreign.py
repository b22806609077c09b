"""Checkpoints of iBOT, DINO and timm, converted to those of this program.

Layouts (published code, `tests/reference/checkpoint_inventory.json`):
- iBOT, full: `student` (names behind `module.`), `teacher`, `ibot_loss`, `args` and more.
- DINO, full: the same with `dino_loss`; its head has no patch prototypes, so the backbone is taken.
- a backbone alone: names at the top (DINO), or under one of WRAPPERS (`state_dict` of iBOT and
  Lightning, `model` of DeiT and MAE, ...), bare or behind any prefix (`module.`, `backbone.`,
  `encoder.`, ...); or timm's names, also in a .safetensors file.

The architecture follows from names and shapes. A tensor that is missing, unknown or of another
shape is refused by name.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibeton.model.checkpoint.backbone_file import SETTINGS, read_safetensors
from ibeton.model.checkpoint.files import (
    NETWORKS,
    backbone_state,
    check_tensors,
    is_own,
    listed,
    read_file,
    read_own,
    without_prefix,
)
from ibeton.model.checkpoint.shapes import infer_backbone, infer_head
from ibeton.model.config import ARCHITECTURES, PUBLISHED_NAMES, ModelConfig
from ibeton.model.ibot import IBOT, build_backbone, build_network
from ibeton.model.loss import IBOTLoss

State = dict[str, Tensor]
# Entries under which others keep a state dict, in the order in which they are looked for.
WRAPPERS = (
    *("state_dict", "model", "model_state_dict", "module", "backbone", "encoder", "net"),
    *("network", "weights", "params", "model_ema", "ema", "state_dict_ema"),
)
# Names that only a backbone has, after any prefix that ends in a dot.
ANCHOR = re.compile(
    r"((?:.*?\.)??)(?:patch_embed\.proj\.|cls_token$|pos_embed$|blocks\.\d+\.|layers\.\d+\.)"
)
# Heads, decoders and tokens of other tasks, which are no part of a backbone.
LEFT_OUT = re.compile(
    r"(?:head|heads|fc|classifier|decoder|projector|projection_head|predictor|head_dist)(?:\.|$)"
    r"|decoder_|mask_token$"
)
# The published trainer's names -> ours, for what tensors' names and shapes do not show.
PUBLISHED_ARCHITECTURES = {
    **{PUBLISHED_NAMES[name]: name for name in ARCHITECTURES},
    **{"deit_tiny": "vit_t", "deit_small": "vit_s"},
}


@dataclass(frozen=True)
class Foreign:
    """What another program's file holds."""

    layout: str
    content: dict[str, Any]  # what `save_checkpoint` takes
    unused: list[str]  # names of tensors and entries that were left out


def read_foreign(path: str | Path, network: str = "teacher", num_heads: int = 0) -> Foreign:
    """Read a checkpoint of iBOT, DINO or timm.

    `network` chooses the backbone if there are two and no iBOT head. `num_heads` must be given for
    a ViT whose width and depth are not published ones, unless the file has it. Raises
    FileNotFoundError, or ValueError for a file or tensor that does not fit: nothing is loaded in
    part.
    """
    if network not in NETWORKS:
        raise ValueError(f"--network {network}: expected teacher or student")
    raw, settings = _read(path)
    if num_heads:
        settings["num_heads"] = num_heads
    if "ibot_loss" in raw:
        return _finite(path, _whole(path, raw, settings))
    state, entry, left_out = _find_state(path, raw, network)
    both = "student" in raw or "teacher" in raw
    layout = "student and teacher" if both else f"{entry} of a checkpoint" if entry else "backbone"
    if "dino_loss" in raw:
        layout = "DINO checkpoint"
    return _finite(path, _backbone(path, state, settings, layout, network, left_out))


def load_weights_into(ibot: IBOT, path: str | Path, network: str = "teacher") -> list[str]:
    """Start student and teacher from the backbone of a checkpoint: of this program, or any that
    `read_foreign` reads. Heads do not change.

    Returns the names of what is not loaded in the student's backbone: `masked_embed`, if the file
    has none. Raises ValueError, naming the tensors, for a backbone of another architecture.
    """
    content = read_own(path) or read_foreign(path, network).content
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


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The file's entries, and the settings that it holds."""
    if Path(path).suffix == ".safetensors":
        tensors, facts = read_safetensors(path)
        if SETTINGS in facts:
            raise ValueError(f"{path} is a backbone of ibeton already: there is nothing to do")
        settings: dict[str, Any] = {k: int(v) for k, v in facts.items() if v.isdecimal()}
        return tensors, settings | {k: v for k, v in facts.items() if k == "arch"}
    content = read_file(path)
    if is_own(content):
        raise ValueError(f"{path} is a checkpoint of ibeton already: there is nothing to do")
    arguments = content.get("args")
    settings = dict(vars(arguments)) if hasattr(arguments, "__dict__") else {}
    return content, settings | {"arch": PUBLISHED_ARCHITECTURES.get(settings.get("arch", ""))}


def _find_state(
    path: str | Path, raw: Mapping[str, Any], network: str
) -> tuple[State, str, list[str]]:
    """The tensors of a file, through the wrappers that are known: under which entry ("" for the
    file itself), and what else there is. `network` chooses between student and teacher."""
    if any(isinstance(value, Tensor) for value in raw.values()):
        left_out = [str(name) for name, value in raw.items() if not isinstance(value, Tensor)]
        state = {str(name): value for name, value in raw.items() if isinstance(value, Tensor)}
        return state, "", left_out
    known = ("student", "teacher")
    names = [network] if set(known) & set(raw) else [name for name in WRAPPERS if name in raw]
    if not names:
        raise ValueError(
            f"{path} is no checkpoint that can be read: it holds no tensors, and none of"
            f" {', '.join(WRAPPERS)}, but {listed(list(map(str, raw))) or 'nothing'}"
        )
    entry = names[0]
    if entry not in raw:
        raise ValueError(f"{path} has no {entry}: it holds {', '.join(map(str, raw))}")
    inner = raw[entry]
    if not isinstance(inner, Mapping) or not inner:
        raise ValueError(f"{path} is no checkpoint that can be read: its {entry} holds no tensors")
    state, deeper, left_out = _find_state(path, inner, network)
    others = [str(name) for name in raw if name != entry]
    return state, f"{entry}.{deeper}" if deeper else entry, left_out + others


def _tensors(path: str | Path, raw: Mapping[str, Any], entry: str) -> State:
    """The state dict under `entry`, names without the prefix that DistributedDataParallel gives."""
    if entry not in raw:
        raise ValueError(f"{path} has no {entry}: it holds {', '.join(map(str, raw))}")
    state = raw[entry]
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{path} is no checkpoint that can be read: its {entry} is no state dict")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _finite(path: str | Path, foreign: Foreign) -> Foreign:
    """`foreign` itself. Raises ValueError, naming the tensors, for weights that are not finite."""
    parts = {name: part for name, part in foreign.content.items() if name != "config"}
    bad = [
        f"{part}.{name}" for part, state in parts.items() for name, tensor in state.items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]  # fmt: skip
    if bad:
        raise ValueError(f"{path} holds values that are not finite: {listed(bad)}")
    return foreign


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
    path: str | Path,
    state: State,
    settings: dict[str, Any],
    layout: str,
    network: str,
    others: list[str],
) -> Foreign:
    """A backbone alone. A head is left out, and named, as it belongs to another task."""
    prefix = _prefix(path, state, network)
    inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    heads = [name for name in inside if LEFT_OUT.match(name)]
    left_out = [prefix + name for name in heads]
    left_out += [name for name in state if not name.startswith(prefix)]
    state = {name: tensor for name, tensor in inside.items() if name not in heads}
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
    layout += f", names behind {prefix!r}" if prefix else ""
    return Foreign(layout, {"teacher": teacher, "config": asdict(config)}, left_out + others)


def _prefix(path: str | Path, state: State, network: str) -> str:
    """The prefix of the backbone's names. Raises ValueError if there are several backbones and
    `network` does not select one."""
    found = Counter(match[1] for name in state if (match := ANCHOR.match(name)))
    if len(found) < 2:
        return next(iter(found), "")
    words = ("teacher", "momentum", "ema") if network == "teacher" else ("student",)
    those = [prefix for prefix in found if any(word in prefix for word in words)]
    if network == "student" and not those:
        those = [p for p in found if not any(w in p for w in ("teacher", "momentum", "ema"))]
    if len(those) != 1:
        raise ValueError(f"{path} holds several backbones, behind {', '.join(map(repr, found))}")
    return those[0]


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
