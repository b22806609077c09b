"""ibeton: pre-train iBOT vision backbones.

`ibeton.load_backbone(path)` reads a trained backbone, `ibeton.build(ibeton.ModelConfig())` makes a
model, and `ibeton.build_loader(ibeton.PipelineConfig(data=...))` yields batches of crops and masks.
The command `ibeton` does the rest: `ibeton --help`.
"""

import os
from typing import TYPE_CHECKING

from ibeton.lazy import exports

if TYPE_CHECKING:
    from ibeton.model import IBOT, ModelConfig, build, load_backbone, training_step
    from ibeton.pipeline import Batch, Loader, PipelineConfig, build_loader

# PyTorch's CPU threads wait for each other after every operation, awake at first. Where other
# programs run, they take the cores from the thread that they wait for: beside one busy core a
# training fell to 8 images/s, and made 134 to 153 with this many turns of waiting, which libgomp
# itself takes if it is given more threads than cores. Read once, when PyTorch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"

__all__ = [
    "IBOT",
    "Batch",
    "Loader",
    "ModelConfig",
    "PipelineConfig",
    "build",
    "build_loader",
    "load_backbone",
    "training_step",
]


_MODEL = ("IBOT", "ModelConfig", "build", "load_backbone", "training_step")
_PIPELINE = ("Batch", "Loader", "PipelineConfig", "build_loader")
# On demand, so that `import ibeton` and `ibeton --help` do not wait for torch
__getattr__ = exports("ibeton", {"model": _MODEL, "pipeline": _PIPELINE})
