"""Where the class token looks: the last block's self-attention, head by head (iBOT, figure 5)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ibeton.evaluation.frozen import features
from ibeton.evaluation.frozen.features import evaluating, normalized
from ibeton.evaluation.photos import PhotoSet
from ibeton.evaluation.pictures import canvas


def class_attention(backbone: nn.Module, images: Tensor) -> Tensor:
    """Normalized images [B, 3, S, S] -> attention of the class token to each patch, float32 [B, H,
    h, w] on the CPU. Heads sum to less than 1: the class token attends to itself too.

    Raises ValueError for a Swin, which has no class token, and for one that is not finite.
    """
    if not hasattr(backbone, "cls_token"):
        raise ValueError("attention of the class token is a ViT's: a Swin has none")
    vit: Any = backbone
    with evaluating(vit), torch.inference_mode():
        attention = features.class_attention(vit, images)
    rows = images.shape[2] // vit.patch_size
    return attention.unflatten(2, (rows, -1)).cpu()


def draw_attention(
    backbone: nn.Module, photos: PhotoSet, indices: list[int], device: str, path: Path
) -> None:
    """A row for each photo: the photo, a map for each head, and the mean of the heads. Each map has
    its peak above it, as a multiple of equal attention to all tokens."""
    maps = class_attention(backbone, normalized(canvas.views_of(photos, indices), device))
    images = canvas.views_of(canvas.to_look_at(photos), indices)
    figure, axes = canvas.new_figure(len(indices), maps.shape[1] + 2)
    for row, (index, image, heads) in enumerate(zip(indices, images, maps, strict=True)):
        canvas.show(axes[row, 0], image, canvas.class_name(photos, index))
        for column, head in enumerate([*heads, heads.mean(dim=0)], start=1):
            name = "mean" if column > len(heads) else f"head {column}"
            peak = f"{float(head.max()) * (head.numel() + 1):.1f} x"
            title = f"{name}: {peak}" if row == 0 else peak
            canvas.show(axes[row, column], head, title, cmap="magma", vmin=0)
    title = (
        "Attention of the class token in the last block, each map from 0 to its peak (1 x: as if"
        " all tokens got the same)"
    )
    canvas.save(figure, path, title)
