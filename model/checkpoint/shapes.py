"""Settings of a network from the names and shapes of its tensors.

If several tensors show a size, the majority decides, so that a tensor of another shape is later
refused by its own name. What no tensor shows gets the default, for the same reason.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibeton.model.config import ARCHITECTURES, SWIN_DIM, SWIN_PATCH, SWINS

State = Mapping[str, Tensor]
SWIN_BLOCKS = [2, 2, 6, 2]  # of Swin-T, by stage


def infer_backbone(path: str | Path, state: State, settings: dict[str, Any]) -> dict[str, Any]:
    """The backbone's fields of ModelConfig. `settings` are those that the file holds. Raises
    ValueError for other networks than the ViTs and Swins of this program."""
    if any(name.startswith("blocks.") for name in state):
        return _vit(path, state, settings)
    if any(name.startswith("layers.") and ".attn." in name for name in state):
        return _swin(path, state, settings)
    raise ValueError(
        f"{path} holds no ViT or Swin: among its {len(state)} tensors"
        f" ({', '.join(list(state)[:3])}, ...) is no attention block"
    )


def _vit(path: str | Path, state: State, settings: dict[str, Any]) -> dict[str, Any]:
    width = _most(_side(state, r"blocks\.\d+\.norm[12]\.weight"), 0)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    project = state.get("patch_embed.proj.weight", torch.empty(0, 3, 16, 16))
    patch = project.shape[3] if project.dim() == 4 else 16
    table = state.get("pos_embed", torch.empty(1, 197, 0))
    grid = math.isqrt(max(1, table.shape[1] - 1)) if table.dim() == 3 else 14
    hidden = _most(_side(state, r"blocks\.\d+\.mlp\.fc1\.bias"), 4 * width)
    found = {
        "patch_size": patch,
        "image_size": grid * patch,
        "mlp_ratio": hidden / width if width else 4.0,
        "qkv_bias": any(name.endswith("attn.qkv.bias") for name in state),
        "layer_scale": 1e-5 if any(name.endswith("gamma_1") for name in state) else 0.0,
        "mean_pool": "fc_norm.weight" in state,
    }
    for arch, (embed_dim, blocks, heads) in ARCHITECTURES.items():
        if (width, depth) == (embed_dim, blocks) and settings.get("num_heads") in (None, 0, heads):
            return {"arch": arch, **found}
    if not settings.get("num_heads"):
        raise ValueError(
            f"{path} is a ViT of width {width} and {depth} blocks, which matches no published"
            " model: give the number of its attention heads with --num-heads"
        )
    sizes = {"embed_dim": width, "depth": depth, "num_heads": int(settings["num_heads"])}
    nearest = min(ARCHITECTURES, key=lambda arch: abs(ARCHITECTURES[arch][0] - width))
    told = settings.get("arch")
    return {"arch": told if told in ARCHITECTURES else nearest, **sizes, **found}


def _swin(path: str | Path, state: State, settings: dict[str, Any]) -> dict[str, Any]:
    stages = range(4)
    norms = [_side(state, rf"layers\.{i}\.blocks\.\d+\.norm[12]\.weight") for i in stages]
    width = _most((side >> i for i in stages for side in norms[i]), 0)
    # The last stage's windows are smaller where its map is.
    rows = _side(state, r"layers\.[012]\.blocks\.\d+\.attn\.relative_position_bias_table")
    window = (math.isqrt(_most(rows, 0)) + 1) // 2
    arch = next((name for name, side in SWINS.items() if side == window), None)
    blocks = [_blocks(state, i) for i in stages]
    if arch is None or width % 3 or blocks != SWIN_BLOCKS:
        windows = " or ".join(map(str, SWINS.values()))
        raise ValueError(
            f"{path} is a Swin of width {width} with {_listed(blocks)} blocks and windows of"
            f" {window}: what can be read is Swin-T, {_listed(SWIN_BLOCKS)} blocks with windows of"
            f" {windows}, and ViTs"
        )
    return {
        "arch": arch,
        "embed_dim": 0 if 8 * width == SWIN_DIM else 8 * width,
        "patch_size": SWIN_PATCH,
        "image_size": int(settings.get("image_size", 224)),
    }


def _blocks(state: State, stage: int) -> int:
    """Blocks of a Swin's stage."""
    prefix = f"layers.{stage}.blocks."
    return 1 + max((int(n.split(".")[3]) for n in state if n.startswith(prefix)), default=0)


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def infer_head(
    path: str | Path, student: State, teacher: State, settings: dict[str, Any]
) -> dict[str, Any]:
    """The head's fields of ModelConfig, from both networks."""
    both = {**teacher, **student}
    places = sorted({int(name.split(".")[2]) for name in both if _is_layer(both, name)})
    if not places:
        raise ValueError(f"{path} has no projection head: head.mlp.0.weight is missing")
    last = rf"head\.mlp\.{places[-1]}\.(weight|bias)"
    hidden = "|".join(str(place) for place in places[:-1])
    norm = "none"
    if "head.mlp.1.weight" in both:
        norm = "bn" if "head.mlp.1.running_mean" in both else "ln"

    def most(pattern: str, default: int) -> int:
        return _most([*_side(student, pattern), *_side(teacher, pattern)], default)

    return {
        "out_dim": most(r"head\.last_layer\.weight_[gv]", 8192),
        "patch_out_dim": most(r"head\.last_layer2\.weight_[gv]", 8192),
        "shared_head": _is_shared(student),
        "shared_head_teacher": _is_shared(student) or _is_shared(teacher),
        "norm_last_layer": bool(settings.get("norm_last_layer", False)),
        "norm_in_head": norm,
        "act": str(settings.get("act_in_head", "gelu")),
        "hidden_dim": most(rf"head\.mlp\.({hidden})\.bias", 2048),
        "bottleneck_dim": most(last, 256),
        "head_layers": len(places),
    }


def _is_layer(state: State, name: str) -> bool:
    return bool(re.fullmatch(r"head\.mlp\.\d+\.weight", name)) and state[name].dim() == 2


def _is_shared(state: State) -> bool:
    """Whether class token and patches share one last layer, which is then saved twice."""
    first, second = (state.get(f"head.{name}.weight_v") for name in ("last_layer", "last_layer2"))
    return first is not None and second is not None and torch.equal(first, second)


def _side(state: State, pattern: str) -> list[int]:
    """The first dimension of every tensor whose whole name matches."""
    return [t.shape[0] for name, t in state.items() if t.dim() and re.fullmatch(pattern, name)]


def _most(values: Iterable[int], default: int) -> int:
    counts = Counter(values)
    return counts.most_common(1)[0][0] if counts else default
