"""`--recipe small`: for 1,000 to 300,000 photos and an hour.

The published recipes are for a million photos and days of GPUs.
docs/small-data.md explains every departure from the published recipe, and what was measured.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ibeton.pipeline.store.joined import open_all
from ibeton.pipeline.store.photos import typical_side

SMALL = "small"
_SEEN_ON_CPU, _SEEN_ON_GPU = 640_000, 6_400_000  # photos, over all epochs: about an hour
_EPOCHS = 5, 800  # at least, at most
_ON_CPU: dict[str, Any] = {
    **{"embed_dim": 128, "depth": 4, "num_heads": 4},
    # 1.6 times the photos per second; memory is no concern at this size.
    **{"precision": "fast", "recompute": "off"},
}
# Share of the run that the warm-ups take.
_WARM_UP = 1 / 32


def small_recipe(data: str | Sequence[str], device: str) -> dict[str, Any]:
    """The settings for the photos in `data` on `device` ("auto", "cpu", "cuda", ...).

    Raises FileNotFoundError or ValueError, naming the path, for what cannot be opened.
    """
    import torch  # only here: the other recipes need no photos, and no GPU

    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    photos = open_all(data)
    return recipe_for(len(photos), typical_side(photos) or 32, on_gpu)


def recipe_for(photos: int, side: int, on_gpu: bool) -> dict[str, Any]:
    """The settings for so many photos whose shorter side is typically `side` pixels."""
    view = next((size for size in (128, 64) if on_gpu and side >= size), 32)
    seen = _SEEN_ON_GPU if on_gpu else _SEEN_ON_CPU
    epochs = int(np.clip(round(seen / photos), *_EPOCHS))
    warm_up = max(1, round(_WARM_UP * epochs))
    return {
        "arch": "vit_t",
        **({} if on_gpu else _ON_CPU),
        "drop_path": 0.0,
        "patch_size": view // (8 if on_gpu else 4),
        "global_crops_size": view,
        "global_crops_scale": (0.5, 1.0),
        "local_crops_number": 0,
        "blur_radius": (0.1, view / 64),
        "color_jitter": (0.4, 0.4, 0.9, 0.5),
        "gray_p": 0.4,
        "epochs": epochs,
        "warmup_epochs": warm_up,
        "warmup_teacher_temp_epochs": warm_up,
        "batch_size": 256 if on_gpu else 64,
        "lr": 1e-3 if on_gpu else 4e-3,
        "min_lr": 1e-5,
        "momentum_teacher": 0.99,
        "weight_decay_end": 0.1,
        "out_dim": 512,
        "hidden_dim": 256,
        "bottleneck_dim": 64,
        **{"warmup_teacher_temp": 0.015, "teacher_temp": 0.015},
        **{"warmup_teacher_patch_temp": 0.015, "teacher_patch_temp": 0.015},
    }
