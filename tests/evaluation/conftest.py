"""A training and a validation folder of photos, and a checkpoint, made once a session."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from photo_folders import COLORS, write_photos

from ibeton.model.checkpoint import model_state, save_checkpoint
from ibeton.model.config import ModelConfig
from ibeton.model.ibot import build


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("photos")
    return write_photos(root / "train", COLORS, 8), write_photos(root / "val", COLORS, 3)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}
    head = {"out_dim": 16, "patch_out_dim": 16, "hidden_dim": 16, "bottleneck_dim": 8}
    config = ModelConfig(**sizes, **head)
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    save_checkpoint(path, model_state(build(config)) | {"config": asdict(config)})
    return path
