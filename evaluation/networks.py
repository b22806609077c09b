"""The networks that an evaluation compares: a checkpoint's, and the same before any training."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ibeton.model.checkpoint import backbone_of, load_checkpoint
from ibeton.model.config import ModelConfig
from ibeton.model.head import IBOTHead
from ibeton.model.ibot import build_network
from ibeton.options import fill


def load_with_head(
    path: str | Path, network: str, content: dict[str, Any] | None = None
) -> tuple[nn.Module, IBOTHead | None, dict[str, Any]]:
    """Backbone, head and settings of a checkpoint's "teacher" or "student", on the CPU. The head
    is None for a checkpoint that holds a backbone alone. `content`: that of the checkpoint, where
    it has been read. Raises as `load_backbone`."""
    content = load_checkpoint(path) if content is None else content
    backbone, config = backbone_of(content, path, network)
    state = content[network]
    weights = {key[len("head.") :]: t for key, t in state.items() if key.startswith("head.")}
    if not weights:
        return backbone, None, config
    head = build_network(fill(ModelConfig, config), is_student=network == "student").head
    head.load_state_dict(weights)
    return backbone, head.eval(), config


def untrained(config: dict[str, Any], seed: int = 0) -> tuple[nn.Module, IBOTHead]:
    """Backbone and head of the teacher that `config` describes, as they are before training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(fill(ModelConfig, config), is_student=False).eval()
    return network.backbone, network.head


def weights_digest(module: nn.Module) -> str:
    """Sixteen hexadecimal digits that tell a module's weights from any others, on any device."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def view_size(given: int | None, config: dict[str, Any]) -> int:
    """The side of a view: `--image-size`, or what the model was built for. Raises ValueError for
    one that patches do not tile."""
    size, patch = given or config["image_size"], config["patch_size"]
    if size < patch or size % patch:
        raise ValueError(f"--image-size {size} is not a multiple of the patch size, {patch}")
    return size
