"""A backbone as safetensors for timm."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ibeton.atomic import replacing
from ibeton.model.backbones.blocks import LAYERNORM_EPS, LayerNorm
from ibeton.model.backbones.vit import VisionTransformer
from ibeton.model.checkpoint.backbone_file import write_safetensors
from ibeton.model.checkpoint.export import (
    check_features,
    check_side,
    refuse_existing,
)
from ibeton.model.checkpoint.files import load_backbone
from ibeton.model.checkpoint.foreign import State
from ibeton.model.config import PUBLISHED_NAMES, SWINS, ModelConfig
from ibeton.options import fill

TIMM_DEFAULTS = {
    "patch_size": 16,
    "img_size": 224,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "init_values": None,
    "global_pool": "token",
    "window_size": 7,
}


def export_timm(source: Path, target: Path, network: str = "teacher", image_size: int = 0) -> str:
    """Write the backbone of checkpoint `source` as safetensors that timm loads.

    `image_size`: side in pixels that the file is for (0: the checkpoint's own). Returns the call
    that loads it. Raises FileExistsError if `target` exists, ValueError if it does not end in
    .safetensors, or if the model in timm computes other features.
    """
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: give a name that ends in .safetensors, by which timm knows it")
    refuse_existing(target)
    import timm

    backbone, settings = load_backbone(source, network)
    config = fill(ModelConfig, settings)
    side = image_size or config.image_size
    check_side(side, config.patch_size)
    name, options = timm_options(config, side)
    # What names and shapes do not show, for reading the file back.
    facts = {"image_size": str(side), "arch": config.arch}
    if config.arch not in SWINS:
        facts["num_heads"] = str(config.backbone_shape()[2])
    with replacing(target, suffix=target.suffix) as partial:
        write_safetensors(partial, timm_state(backbone, side), facts)
        theirs = timm.create_model(name, num_classes=0, checkpoint_path=str(partial), **options)
        theirs.eval()
        check_features("timm", backbone, lambda x: _timm_tokens(theirs, x), side)
    words = "".join(f", {key}={_shown(value)}" for key, value in options.items())
    return f"timm.create_model({name!r}, num_classes=0, checkpoint_path={str(target)!r}{words})"


def timm_state(backbone: nn.Module, side: int) -> State:
    """The backbone's tensors under timm's names, a ViT's position table for `side` pixels."""
    state = backbone.state_dict()
    state.pop("masked_embed", None)
    if isinstance(backbone, VisionTransformer):
        with torch.no_grad():
            state["pos_embed"] = backbone.position_embedding(side, side)
    renamed = {}
    for name, tensor in state.items():
        if name.endswith("relative_position_index"):
            continue
        name = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        if ".downsample." in name:  # timm merges tokens at the start of a stage
            stage, rest = name.removeprefix("layers.").split(".", 1)
            name = f"layers.{int(stage) + 1}.{rest}"
        renamed[name] = tensor.contiguous()
    return renamed


def timm_options(config: ModelConfig, side: int) -> tuple[str, dict[str, Any]]:
    """timm's name of the architecture, and what to give `create_model` beside it."""
    options: dict[str, Any] = {}
    if config.arch in SWINS:
        # Windows and shifts follow from the size that the network was built for.
        options |= {"img_size": config.image_size, "window_size": SWINS[config.arch]}
        if side != config.image_size:
            options |= {"strict_img_size": False}
        if config.embed_dim:
            options |= {"embed_dim": config.embed_dim // 8}
        options |= {"norm_layer": LayerNorm}
    else:
        embed_dim, depth, num_heads = config.backbone_shape()
        published = ModelConfig(arch=config.arch).backbone_shape()
        if (embed_dim, depth, num_heads) != published:
            options |= {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
        options |= {
            "patch_size": config.patch_size,
            "img_size": side,
            "mlp_ratio": config.mlp_ratio,
            "qkv_bias": config.qkv_bias,
            "init_values": config.layer_scale or None,
            "global_pool": "avg" if config.mean_pool else "token",
        }
    changed = {k: v for k, v in options.items() if k not in TIMM_DEFAULTS or v != TIMM_DEFAULTS[k]}
    suffix = "patch4_window7_224" if config.arch in SWINS else "patch16_224"
    return f"{PUBLISHED_NAMES[config.arch]}_{suffix}", changed


def _shown(value: Any) -> str:
    return f"partial(nn.LayerNorm, eps={LAYERNORM_EPS:g})" if callable(value) else repr(value)


def _timm_tokens(theirs: nn.Module, images: Tensor) -> Tensor:
    """[B, 1 + N, C]: timm's pooled output (of `num_classes=0`), then the patch tokens."""
    tokens = cast(Any, theirs).forward_features(images)
    patches = tokens.flatten(1, 2) if tokens.dim() == 4 else tokens[:, 1:]
    return torch.cat([theirs(images).unsqueeze(1), patches], dim=1)
