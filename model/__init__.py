"""The iBOT model: a batch in, a loss out. `build(ModelConfig())` is the door."""

from model.config import ModelConfig
from model.ibot import IBOT, build
from model.steps import training_step

__all__ = ["IBOT", "ModelConfig", "build", "training_step"]
