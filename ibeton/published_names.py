"""What options and values of the published iBOT and DINO trainers are called here.

Nothing is translated silently: an error names the spelling to give.
"""

import difflib
from collections.abc import Sequence

# option without dashes, words joined by "_" -> what to give instead
OPTIONS = {
    "data_path": "--data",
    "batch_size_per_gpu": "--batch-size",
    "num_workers": "--workers",
    "use_fp16": "--precision fp16 (or fp32 for false)",
    "saveckp_freq": "--keep-every",
    "load_from": "--init-from, or --resume to continue a run",
    "pretrained_weights": "--checkpoint in evaluations, --init-from in training",
    "checkpoint_key": "--network",
    "act_in_head": "--act",
    "use_bn_in_head": "--norm-in-head bn",
    "drop_path_rate": "--drop-path",
    "window_size": "--arch swin_t7 or swin_t14",
    "use_masked_im_modeling": "--pred-ratio 0 to train without masks",
    "nb_knn": "--k",
    "momentum": "--momentum-teacher, or --center-momentum",
    "lr_scale": "--lr, which is per 256 images",
    "wd": "--weight-decay",
    "gpus": "torchrun --nproc_per_node",
}
# options that have no counterpart -> why
NOT_NEEDED = {
    "local_rank": "torchrun sets it",
    "dist_url": "torchrun or srun sets it",
    "dist_backend": "it follows from --device",
    "in_chans": "crops are RGB, so it was removed",
}
VALUES = {
    "vit_tiny": "vit_t",
    "vit_small": "vit_s",
    "vit_base": "vit_b",
    "vit_large": "vit_l",
    "deit_tiny": "vit_t",
    "deit_small": "vit_s",
    "swin_tiny": "swin_t7 or swin_t14, by the window",
    "syncbn": "bn",
    "half": "fp16",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
}


def nearest_option(word: str, known: Sequence[str]) -> str:
    """A sentence about `word`, which is none of the options `known`."""
    name = word.split("=")[0]
    plain = name.lstrip("-").replace("-", "_")
    if not name.startswith("-"):
        return f"unexpected argument {word!r}"
    if plain in NOT_NEEDED:
        return f"unknown option {name}: not needed, {NOT_NEEDED[plain]}"
    # The table speaks of training and evaluation: only what this command knows is suggested.
    if plain in OPTIONS and any(part in known for part in OPTIONS[plain].replace(",", "").split()):
        return f"unknown option {name}: here it is {OPTIONS[plain]}"
    near = difflib.get_close_matches(name.replace("_", "-"), known, 1, 0.7)
    hint = f"did you mean {near[0]}?" if near else "--help lists the options"
    return f"unknown option {name}: {hint}"


def nearest_value(value: str, choices: Sequence[str]) -> str:
    """What to say of a value that is none of `choices`."""
    told = VALUES.get(value.lower(), "")
    if told.split(" ")[0] in choices:
        return f"{value} is called {told} here"
    near = difflib.get_close_matches(value, choices, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{value} is none of {', '.join(choices)}{hint}"
