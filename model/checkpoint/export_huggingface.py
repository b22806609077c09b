"""A ViT backbone as a folder for Hugging Face's transformers."""

import os
import shutil
from pathlib import Path
from typing import Any

from ibeton.atomic import partial_name
from ibeton.model.backbones.blocks import LAYERNORM_EPS
from ibeton.model.checkpoint.backbone_file import write_safetensors
from ibeton.model.checkpoint.export import (
    check_features,
    check_side,
    refuse_existing,
)
from ibeton.model.checkpoint.export_timm import timm_state
from ibeton.model.checkpoint.files import load_backbone
from ibeton.model.checkpoint.foreign import State
from ibeton.model.config import SWINS, ModelConfig
from ibeton.options import fill

HUGGINGFACE_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def export_huggingface(
    source: Path, target: Path, network: str = "teacher", image_size: int = 0
) -> str:
    """Write a ViT backbone as a folder that `transformers.ViTModel` loads.

    As `export_timm`. Also raises ValueError for a network that ViTModel cannot express.
    """
    refuse_existing(target)
    import transformers

    backbone, settings = load_backbone(source, network)
    config = fill(ModelConfig, settings)
    if config.arch in SWINS or config.mean_pool or config.layer_scale:
        raise ValueError(
            f"{source}: transformers' ViTModel has neither windows nor mean pooling nor layer"
            " scale; export it with --to timm"
        )
    side = image_size or config.image_size
    check_side(side, config.patch_size)
    partial = partial_name(target)
    try:
        partial.mkdir(parents=True)
        _huggingface_config(config, side).save_pretrained(partial)
        state = huggingface_state(timm_state(backbone, side))
        write_safetensors(partial / "model.safetensors", state, {})
        transformers.logging.disable_progress_bar()
        loaded: Any = transformers.ViTModel.from_pretrained(
            partial, add_pooling_layer=False, output_loading_info=True
        )
        theirs, report = loaded
        left = [name for kind in ("missing_keys", "unexpected_keys") for name in report[kind]]
        if left:
            raise ValueError(f"transformers does not take {left[0]} as it was written; not written")
        tokens = lambda x: theirs.eval()(x).last_hidden_state  # noqa: E731
        check_features("transformers", backbone, tokens, side)
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"transformers.ViTModel.from_pretrained({str(target)!r}, add_pooling_layer=False)"


def _huggingface_config(config: ModelConfig, side: int) -> Any:
    from transformers import ViTConfig

    embed_dim, depth, num_heads = config.backbone_shape()
    return ViTConfig(
        hidden_size=embed_dim,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        intermediate_size=int(embed_dim * config.mlp_ratio),
        layer_norm_eps=LAYERNORM_EPS,
        image_size=side,
        patch_size=config.patch_size,
        num_channels=3,
        qkv_bias=config.qkv_bias,
        architectures=["ViTModel"],
    )


def huggingface_state(state: State) -> State:
    """timm's names of a ViT -> those of `transformers.ViTModel`, query, key and value apart.

    The names are those of transformers 4, which version 5 reads too.
    """
    renamed = {}
    for name, tensor in state.items():
        if name in HUGGINGFACE_NAMES:
            renamed[HUGGINGFACE_NAMES[name]] = tensor
            continue
        module, kind = name.rsplit(".", 1)
        prefix = ""
        if module.startswith("blocks."):
            _, number, module = module.split(".", 2)
            prefix = f"encoder.layer.{number}."
        if module == "attn.qkv":
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            renamed |= {
                f"{prefix}attention.attention.{part}.{kind}": rows.contiguous()
                for part, rows in parts
            }
        else:
            renamed[f"{prefix}{HUGGINGFACE_NAMES[module]}.{kind}"] = tensor
    return renamed
