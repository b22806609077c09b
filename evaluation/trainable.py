"""What training a backbone further needs, whatever the task: the backbone, its precision, its
layers, random draws."""

import dataclasses
import random
from typing import Any

import numpy as np
import torch
from torch import nn

from ibeton.model.config import ModelConfig
from ibeton.model.ibot import build_backbone
from ibeton.training import precision as training
from ibeton.training.config import PRECISIONS


def precision_on(device: torch.device | str, name: str) -> tuple[str, torch.dtype | None]:
    """The precision that `name` means on a device, as in pre-training, and what autocast computes
    in: None for fp32. Raises ValueError for fp16 on a CPU, or another word."""
    if name not in PRECISIONS:
        raise ValueError(f"--precision {name}: expected one of {', '.join(PRECISIONS)}")
    name = training.precision_on(torch.device(device), name)
    return name, training.DTYPES[name]


def trainable_backbone(settings: ModelConfig, drop_path: float, again: bool = False) -> nn.Module:
    """A new backbone with stochastic depth and without a mask token; `again`: it computes blocks
    again in the backward."""
    settings = dataclasses.replace(settings, drop_path=drop_path, checkpoint_blocks=again)
    backbone = build_backbone(settings, is_student=True)
    backbone.masked_embed = None
    return backbone


def layers_of(backbone: str) -> dict[str, Any]:
    """timm's `group_matcher` of a network whose backbone goes by the pattern `backbone`, from the
    input on: what embeds, each block, and all else (final norm, heads) as the last."""
    return {
        "stem": rf"^{backbone}\.(?:cls_token|pos_embed|patch_embed)",
        "blocks": [
            (rf"^{backbone}\.blocks\.(\d+)", None),
            (rf"^{backbone}\.layers\.(\d+)\.blocks\.(\d+)", None),  # Swin
            (rf"^{backbone}\.layers\.(\d+)\.downsample", (1_000,)),  # behind the stage's blocks
        ],
    }


def seed_all(*entropy: int) -> None:
    """Seed the generators that timm, dropout and stochastic depth draw from, by these numbers."""
    seeds = np.random.SeedSequence(entropy).generate_state(3, np.uint64)
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]) % 2**32)  # noqa: NPY002 - timm's mixup draws from this one
    torch.manual_seed(int(seeds[2]))
