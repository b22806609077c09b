"""What training a backbone further needs, whatever the task: the backbone, its precision, random
draws."""

import dataclasses
import random

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


def seed_all(*entropy: int) -> None:
    """Seed the generators that timm, dropout and stochastic depth draw from, by these numbers."""
    seeds = np.random.SeedSequence(entropy).generate_state(3, np.uint64)
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]) % 2**32)  # noqa: NPY002 - timm's mixup draws from this one
    torch.manual_seed(int(seeds[2]))
