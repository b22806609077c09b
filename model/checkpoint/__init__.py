"""Checkpoints: this program's own, imports of others, and exports to others.

`python -m model.checkpoint import|export|inspect` is the command.
"""

from ibeton.model.checkpoint.backbone_file import write_backbone
from ibeton.model.checkpoint.files import (
    backbone_of,
    check_same_model,
    load_backbone,
    load_checkpoint,
    model_state,
    restore_model,
    save_checkpoint,
    write_through,
)
from ibeton.model.checkpoint.foreign import load_weights_into, read_foreign

__all__ = [
    "backbone_of",
    "check_same_model",
    "load_backbone",
    "load_checkpoint",
    "load_weights_into",
    "model_state",
    "read_foreign",
    "restore_model",
    "save_checkpoint",
    "write_backbone",
    "write_through",
]
