"""Small folders of photos that any backbone tells apart, and a small backbone."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ibeton.evaluation.finetune.classifier import Classifier, build_classifier
from ibeton.evaluation.finetune.config import FinetuneConfig
from ibeton.model import ModelConfig
from ibeton.model.backbones.vit import VisionTransformer
from ibeton.model.checkpoint import load_checkpoint

COLORS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}


def write_photos(folder: Path, classes: dict[str, tuple[int, int, int]], each: int) -> Path:
    """Write `each` noisy photos of one color for each class, of several shapes."""
    noise = np.random.default_rng(len(classes) * 100 + each)
    for name, color in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            shape = ((40, 60), (60, 40), (48, 48), (100, 33))[i % 4]
            pixels = np.array(color) + noise.normal(0, 40, (*shape, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / name / f"{i}.jpg", quality=95)
    return folder


def wait_for_another_time(folder: Path) -> None:
    """Until a file that is written has a later time of change than any file of before."""
    probe = folder / "probe"
    probe.write_text("")
    first = probe.stat().st_ctime_ns
    while probe.stat().st_ctime_ns == first:
        probe.write_text("")


def new_classifier(checkpoint, classes: int, **settings) -> Classifier:
    """As fine-tuning builds it, without stochastic depth where nothing else is said."""
    plain = {"drop_path": 0.0, "head_init_scale": 1.0, **settings}
    config = FinetuneConfig(checkpoint=str(checkpoint), **plain)
    return build_classifier(config, load_checkpoint(checkpoint), classes)


def small_vit(is_student=False, **options) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}
    return VisionTransformer(ModelConfig(**{**sizes, **options}), is_student)
