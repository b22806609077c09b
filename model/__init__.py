"""The iBOT model: a batch in, a loss out. `build(ModelConfig())` makes one; `load_backbone(path)`
loads the backbone of one that was trained."""

from ibeton.model.checkpoint import load_backbone
from ibeton.model.config import ModelConfig
from ibeton.model.ibot import IBOT, build
from ibeton.model.steps import training_step

__all__ = ["IBOT", "ModelConfig", "build", "load_backbone", "training_step"]
