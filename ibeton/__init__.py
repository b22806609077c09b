"""ibeton: pre-train iBOT vision backbones.

`ibeton.load_backbone(path)` reads a trained backbone, `ibeton.build(ibeton.ModelConfig())` makes a
model, and `ibeton.build_loader(ibeton.PipelineConfig(data=...))` yields batches of crops and masks.
The command `ibeton` does the rest: `ibeton --help`.
"""

from typing import TYPE_CHECKING

from ibeton.lazy import exports

if TYPE_CHECKING:
    from ibeton.model import IBOT, ModelConfig, build, load_backbone, training_step
    from ibeton.pipeline import Batch, Loader, PipelineConfig, build_loader

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
