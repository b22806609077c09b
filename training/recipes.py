"""The published recipes, and what shortens their warm-ups in short runs.

A recipe holds what differs from the defaults, which are the published ViT-S/16 recipe.
`tests/reference/recipes.json` gives the source of every value.
"""

from typing import Any

_VIT_B: dict[str, Any] = {
    "arch": "vit_b",
    "epochs": 400,
    "global_crops_scale": (0.32, 1.0),
    "local_crops_scale": (0.05, 0.32),
    "warmup_teacher_temp_epochs": 50,
    "norm_last_layer": True,
    "freeze_last_layer": 3,
    "lr": 7.5e-4,
    "min_lr": 2e-6,
    "clip_grad": 0.3,
}
# Random masks of 65 to 75 % of the patches, on half of the global views.
_RANDOM_MASKS = {"pred_shape": "rand", "pred_ratio": (0.0, 0.7), "pred_ratio_var": (0.0, 0.05)}
# One source only: hold it against a run of yours before you rely on it.
_VIT_L: dict[str, Any] = {
    **_VIT_B,
    "arch": "vit_l",
    "epochs": 250,
    "global_crops_scale": (0.25, 1.0),
    "local_crops_scale": (0.05, 0.25),
    "lr": 5e-4,
    "min_lr": 2e-4,
    "weight_decay_end": 0.48,
    "drop_path": 0.2,
}
_SWIN_T: dict[str, Any] = {"patch_size": 32, "epochs": 300, "pred_start_epoch": 50}
RECIPES: dict[str, dict[str, Any]] = {
    "vit_t": {"arch": "vit_t"},  # not published: ViT-S's recipe on a smaller backbone
    "vit_s": {"arch": "vit_s"},
    "vit_b": _VIT_B,
    "vit_b_rand": {**_VIT_B, **_RANDOM_MASKS},
    "vit_l": _VIT_L,
    "swin_t7": {**_SWIN_T, "arch": "swin_t7"},
    "swin_t14": {**_SWIN_T, "arch": "swin_t14"},
    # ImageNet-22K: the lengths are published, all else is taken from the 1K recipe.
    "vit_b_22k": {**_VIT_B, "epochs": 80},
    "vit_l_22k": {**_VIT_L, "epochs": 50},
}
# Shares of the run, for runs that are too short for the recipe's epochs: those of the published
# runs of 100 epochs, and Swin's 50 of 300 before masking.
_SHARES = {"warmup_epochs": 0.1, "warmup_teacher_temp_epochs": 0.3, "pred_start_epoch": 1 / 6}


def shortened(values: dict[str, Any]) -> dict[str, int]:
    """Warm-ups that suit the `epochs` of `values`, for a run too short for those of `values`
    ("warmup_epochs", "warmup_teacher_temp_epochs", "pred_start_epoch", "freeze_last_layer");
    empty for a run that is long enough."""
    epochs = values["epochs"]
    temperature = values["warmup_teacher_temp_epochs"] + values["pred_start_epoch"]
    if epochs < 1 or max(values["warmup_epochs"], temperature) <= epochs:
        return {}
    fitting = {name: max(round(share * epochs), int(epochs > 1)) for name, share in _SHARES.items()}
    fitting["freeze_last_layer"] = epochs // 2
    return {name: new for name, new in fitting.items() if new < values[name]}
