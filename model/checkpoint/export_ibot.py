"""Checkpoints in the layouts of the published iBOT code."""

import argparse
from pathlib import Path
from typing import Any

import torch

from ibeton.atomic import replacing
from ibeton.model.checkpoint.export import refuse_existing
from ibeton.model.checkpoint.files import load_backbone, load_checkpoint, write_through
from ibeton.model.checkpoint.foreign import read_foreign
from ibeton.model.config import PUBLISHED_NAMES, SWINS, ModelConfig
from ibeton.options import fill


def export_ibot(source: Path, target: Path, network: str = "teacher") -> str:
    """Write a whole checkpoint in the published layout: student (behind `module.`), teacher,
    ibot_loss, epoch and args. Optimizer and scaler are left out: only this program reads their
    state."""
    refuse_existing(target)
    content = load_checkpoint(source)
    if "student" not in content:
        raise ValueError(f"{source} holds a backbone alone: export it with --to ibot-backbone")
    settings = content["config"]
    published = {
        "student": {f"module.{name}": tensor for name, tensor in content["student"].items()},
        "teacher": content["teacher"],
        "ibot_loss": content["ibot_loss"],
        "epoch": int(content.get("epoch", 0)),
        "args": _arguments(settings),
    }
    _write_checked(published, target, content, settings)
    return f"--pretrained_weights {target} --checkpoint_key {network}   (the published code)"


def export_ibot_backbone(source: Path, target: Path, network: str = "teacher") -> str:
    """Write the backbone alone in the published layout: `state_dict`, names without prefix."""
    refuse_existing(target)
    backbone, settings = load_backbone(source, network)
    state = backbone.state_dict()
    prefixed = {f"backbone.{name}": tensor for name, tensor in state.items()}
    _write_checked({"state_dict": state}, target, {"teacher": prefixed}, settings)
    return f"--pretrained_weights {target} --checkpoint_key state_dict   (the published code)"


def _arguments(settings: dict[str, Any]) -> argparse.Namespace:
    """Our settings, those of the backbone and the head in the published words."""
    words = {**settings, "arch": PUBLISHED_NAMES[settings["arch"]], "num_heads": _heads(settings)}
    words["act_in_head"] = words.pop("act")
    if settings["arch"] in SWINS:  # the published flag means the embedding's patches
        words |= {"patch_size": 4, "window_size": SWINS[settings["arch"]]}
    return argparse.Namespace(**words)


def _heads(settings: dict[str, Any]) -> int:
    """A ViT's attention heads, which no tensor shows; 0 for a Swin."""
    config = fill(ModelConfig, settings)
    return 0 if config.arch in SWINS else config.backbone_shape()[2]


def _write_checked(
    published: dict[str, Any], target: Path, ours: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Save, read back by the importer and compare every tensor before the name appears."""
    with replacing(target) as partial:
        write_through(partial, published)
        content = read_foreign(partial, num_heads=_heads(settings)).content
        for part in ("student", "teacher", "ibot_loss"):
            for name, tensor in ours.get(part, {}).items():
                if not torch.equal(content[part][name], tensor):
                    raise ValueError(f"{part} {name} is another when read back; not written")
