"""What makes the model's step faster, each to be taken away by itself: `with without(change):`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ibeton.benchmarks.harness.model_step import Baseline, Side
from ibeton.model.backbones.blocks import Kept
from ibeton.model.backbones.vit import PatchEmbed, VisionTransformer
from ibeton.model.kernels.cross_entropy import cross_entropy_reference
from ibeton.model.kernels.gelu_linear import gelu_linear_reference
from ibeton.model.kernels.norm_linear import norm_linear_reference
from ibeton.model.network import Logits, Network, Targets, views_one_by_one


def attention_reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1) @ value


def every_patch(network: Network, *arguments: Any) -> Logits:
    """`Network.forward` with the head on every patch; the masked ones are taken afterwards."""
    *views, patch_indices = arguments
    cls, patch, local_cls = FORWARD(network, *views)
    return cls, patch.flatten(0, 1)[patch_indices], local_cls


def every_target(network: Network, global_crops: Tensor, patch_indices: Tensor) -> Targets:
    cls, patch, _ = FORWARD(network, global_crops)
    return Targets(cls, patch.flatten(0, 1)[patch_indices], patch.float().mean(dim=(0, 1)))


def ungathered(kept: Tensor, token_of: Tensor, rate: float, shapes: Any) -> Any:
    factor = kept[token_of].unsqueeze(1) / (1 - rate)
    return Kept(None, shapes, 1 / (1 - rate), factor)


def last_block_whole(vit: Any, x: Tensor, shapes: Any, rows: Tensor | None = None) -> Tensor:
    x = BLOCKS(vit, x, shapes)
    return x if rows is None else x.index_select(0, rows)


def one_by_one(network: Network, views: Any, masks: Any, patch_indices: Tensor) -> Any:
    indices = [patch_indices, *[patch_indices[:0]] * (len(views) - 1)]
    tokens = views_one_by_one(network.backbone, views, masks, indices)
    return torch.cat([*(cls for cls, _ in tokens), tokens[0][1]]), patch_indices.shape


def patches_by_convolution(embed: PatchEmbed, x: Tensor) -> Tensor:
    return embed.proj(x).flatten(2).transpose(1, 2)


def one_parameter_at_a_time(side: Side) -> None:
    """AdamW's step, of gradients that are known to be finite."""
    groups = side.optimizer.param_groups
    for group in groups:
        group.update(fused=False, foreach=False)
    side.optimizer.step()
    for group in groups:
        group.update(fused=True, foreach=None)


def no_kernels(x: Tensor) -> bool:
    return False


FORWARD = Network.forward
BLOCKS = VisionTransformer._blocks
# What to put back, to see what a change brings: name -> (where, what was there before the change).
CHANGES: dict[str, list[tuple[str, Any]]] = {
    "head on masked patches alone": [
        ("ibeton.model.network.Network.forward", every_patch),
        ("ibeton.model.network.Network.targets", every_target),
    ],
    "Triton kernels (GPU)": [
        ("ibeton.model.backbones.vit.kernels_run_on", no_kernels),
        ("ibeton.model.head.kernels_run_on", no_kernels),
        ("ibeton.model.kernels.half_weights.kernels_run_on", no_kernels),
    ],
    "fused loss": [("ibeton.model.loss.cross_entropy", cross_entropy_reference)],
    "scaled_dot_product_attention": [
        ("ibeton.model.backbones.blocks.F.scaled_dot_product_attention", attention_reference)
    ],
    "crop sizes packed": [("ibeton.model.network.Network._rows", one_by_one)],
    "norm and GELU recomputed": [
        ("ibeton.model.backbones.blocks.norm_linear", norm_linear_reference),
        ("ibeton.model.backbones.blocks.gelu_linear", gelu_linear_reference),
    ],
    "MLP of the last block on selected tokens": [
        ("ibeton.model.backbones.vit.VisionTransformer._blocks", last_block_whole)
    ],
    "patches by one matrix product": [
        ("ibeton.model.backbones.vit.PatchEmbed.forward", patches_by_convolution)
    ],
    "all parameters together: AdamW, clipping, EMA": [
        ("ibeton.benchmarks.harness.model_step.Side.optimize", one_parameter_at_a_time),
        ("ibeton.benchmarks.harness.model_step.Side.clip", Baseline.clip),
        ("ibeton.benchmarks.harness.model_step.Side.ema", Baseline.ema),
    ],
    "dropped samples left out (CPU)": [("ibeton.model.backbones.blocks._gathered", ungathered)],
}


@contextmanager
def without(change: str | None) -> Iterator[None]:
    """The model as it is without one of CHANGES."""
    patches = [mock.patch(where, what) for where, what in CHANGES.get(change or "", [])]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
