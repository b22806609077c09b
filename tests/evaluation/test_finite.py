"""A network whose outputs are no numbers is refused by every evaluation: the largest of NaN, or the
nearest to it, would be a plausible answer."""

import numpy as np
import pytest
import torch
from photo_folders import small_vit
from PIL import Image
from torch import nn

from ibeton.evaluation.dense.detector import Detector
from ibeton.evaluation.finetune.score import score
from ibeton.evaluation.frozen.features import Extraction, extract
from ibeton.evaluation.matching.correspondence import TASK as CORRESPONDENCE
from ibeton.evaluation.matching.davis import Video, segment
from ibeton.evaluation.matching.landmarks import multiscale_feature
from ibeton.evaluation.photos import PhotoSet
from ibeton.evaluation.pictures.attention import class_attention
from ibeton.evaluation.robustness.accuracy import top1
from ibeton.evaluation.robustness.curves import Saliency, measure
from ibeton.evaluation.tasks import Subject
from ibeton.model import ModelConfig, build

HOW = Extraction(batch_size=4)


class Broken(nn.Module):
    """A classifier whose logits hold one NaN each."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = images.flatten(1)[:, :3].clone()
        logits[:, 0] = float("nan")
        return logits


def broken_vit() -> nn.Module:
    backbone = small_vit()
    backbone.norm.weight.data[0] = float("nan")
    return backbone


def broken_attention() -> nn.Module:
    backbone = small_vit()
    backbone.blocks[-1].attn.qkv.bias.data[0] = float("nan")
    return backbone


def subject() -> Subject:
    return Subject("teacher", broken_vit(), {"patch_size": 8}, HOW)


def video(folder) -> Video:
    frames = [folder / f"{i}.png" for i in range(3)]
    masks = [folder / f"mask{i}.png" for i in range(3)]
    for frame, mask in zip(frames, masks, strict=True):
        Image.new("RGB", (64, 64), (9, 90, 200)).save(frame)
        Image.fromarray(np.eye(64, dtype=np.uint8)).save(mask)
    return Video("video", frames, masks)


def prototypes(folders, tmp_path) -> None:
    network = build(ModelConfig(embed_dim=32, depth=2, num_heads=2, patch_size=8, image_size=32))
    head = network.teacher.head
    next(head.parameters()).data[0] = float("nan")
    extract(small_vit(), PhotoSet(folders[1], 32), ("prototype",), HOW, head)


def two_views(folders, tmp_path) -> None:
    args = type("Args", (), {"image_size": 32, "data": folders[1]})
    CORRESPONDENCE.scores(args, CORRESPONDENCE.read(args, {}), subject())


def saliency(folders, tmp_path) -> None:
    whole = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    measure(whole, Saliency(broken_attention()), PhotoSet(folders[1], 32), 8, HOW)


def detect(folders, tmp_path) -> None:
    detector = Detector(small_vit(), 3, 16).eval()
    detector.pyramid.backbone.blocks[-1].mlp.fc2.bias.data[0] = float("nan")
    detector.detect(torch.randn(1, 3, 64, 64), [(64, 64)])


EVALUATIONS = {
    "features": lambda f, t: extract(broken_vit(), PhotoSet(f[1], 32), ("cls",), HOW),
    "prototypes": prototypes,
    "top1": lambda f, t: top1(Broken(), PhotoSet(f[1], 32), HOW, "top1"),
    "damage": lambda f, t: measure(Broken(), None, PhotoSet(f[1], 32), 8, HOW),
    "saliency": saliency,
    "davis": lambda f, t: list(segment(video(t), subject(), 64)),
    "retrieve": lambda f, t: multiscale_feature(torch.zeros(3, 64, 64).byte(), subject()),
    "correspondence": two_views,
    "attention": lambda f, t: class_attention(broken_attention(), torch.randn(1, 3, 32, 32)),
    "detect": detect,
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_outputs_that_are_no_numbers_are_refused(name, folders, tmp_path):
    with torch.inference_mode(), pytest.raises(ValueError, match="NaN or infinity"):
        EVALUATIONS[name](folders, tmp_path)


def test_a_photo_with_a_logit_that_is_no_number_counts_as_wrong(folders):
    """Fine-tuning goes on: a single photo may overflow in half precision."""
    (scores,) = score([Broken()], PhotoSet(folders[1], 32), HOW)
    assert (scores["top1"], scores["top5"]) == (0, 0)
