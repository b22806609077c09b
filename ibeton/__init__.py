"""ibeton: pre-train iBOT vision backbones.

`ibeton.load_backbone(path)` reads a trained backbone, `ibeton.build(ibeton.ModelConfig())` makes a
model, and `ibeton.build_loader(ibeton.PipelineConfig(data=...))` yields batches of crops and masks.
The command `ibeton` does the rest: `ibeton --help`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ibeton.model import IBOT, ModelConfig, build, load_backbone, training_step
    from ibeton.pipeline import Batch, Loader, PipelineConfig, build_loader

__version__ = "0.1.0"

_FROM = {
    **dict.fromkeys(("IBOT", "ModelConfig", "build", "load_backbone", "training_step"), "model"),
    **dict.fromkeys(("Batch", "Loader", "PipelineConfig", "build_loader"), "pipeline"),
}
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


def __getattr__(name: str) -> Any:
    """Import on demand, so that `import ibeton` and `ibeton --help` do not wait for torch."""
    if name not in _FROM:
        raise AttributeError(f"module 'ibeton' has no attribute {name!r}")
    return getattr(import_module(f"ibeton.{_FROM[name]}"), name)
