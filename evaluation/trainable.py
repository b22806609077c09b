"""What training a backbone further needs, whatever the task: the backbone, its precision, random
draws."""

import dataclasses
import random

import numpy as np
import torch
from torch import nn

from ibeton.model.config import ModelConfig
from ibeton.model.ibot import build_backbone

_DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = ("auto", *_DTYPES)


def precision_on(device: torch.device | str, name: str) -> tuple[str, torch.dtype | None]:
    """The precision that `name` means on a device, auto being fp16 on a GPU and fp32 on a CPU, and
    what autocast computes in: None for fp32. Raises ValueError for fp16 on a CPU, or another
    word."""
    on_cpu = torch.device(device).type == "cpu"
    if name == "auto":
        name = "fp32" if on_cpu else "fp16"
    if name not in _DTYPES:
        raise ValueError(f"--precision {name}: expected one of {', '.join(PRECISIONS)}")
    if name == "fp16" and on_cpu:
        raise ValueError("--precision fp16 needs a GPU; on a CPU use fp32 or bf16")
    return name, _DTYPES[name]


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
