"""What robustness is measured of: a backbone with the linear layer that linear probing left, or a
fine-tuned classifier."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibeton.evaluation.finetune.classifier import load_classifier as load_finetuned
from ibeton.evaluation.frozen.features import tokens_of
from ibeton.evaluation.networks import weights_digest
from ibeton.evaluation.photos import EVALUATION_VIEWS, View, bilinear_view
from ibeton.model.checkpoint import backbone_of, load_checkpoint
from ibeton.model.checkpoint.files import read_file

IMAGENET = 1000  # classes


class ProbedBackbone(nn.Module):
    """Images [B, 3, S, S] -> logits [B, K], by a linear layer on features of a frozen backbone."""

    weight: Tensor  # [K, C]
    bias: Tensor  # [K]

    def __init__(
        self, backbone: nn.Module, features: tuple[str, ...], weight: Tensor, bias: Tensor
    ) -> None:
        super().__init__()
        self.backbone, self.features = backbone, features
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, images: Tensor) -> Tensor:
        found = tokens_of(self.backbone, None, images, self.features)
        joined = torch.cat([found[name] for name in self.features], dim=1)
        return F.linear(joined.float(), self.weight, self.bias)


@dataclass(frozen=True)
class Classifier:
    """A classifier and what its images have to be."""

    model: nn.Module  # normalized images [B, 3, S, S] -> logits [B, K]; `backbone` gives tokens
    classes: list[str]  # their names, empty where they have none
    num_classes: int
    size: int  # side of a view in pixels
    config: dict[str, Any]  # of the backbone
    view: View = bilinear_view  # how photos of any size are cut


def load_classifier(checkpoint: Path, head: Path | None, network: str) -> Classifier:
    """The classifier, in evaluation mode on the CPU.

    `head`: what linear probing wrote by --save-head; without it, the checkpoint is a fine-tuned
    one. Raises FileNotFoundError, or ValueError for files that do not belong together.
    """
    content = load_checkpoint(checkpoint)
    if head is None:
        return _finetuned(checkpoint, content)
    probe = read_file(head)
    if missing := {"weight", "bias", "features", "classes", "image_size", "backbone"} - set(probe):
        raise ValueError(f"--head {head} is no layer of linear probing: it lacks {min(missing)}")
    backbone, config = backbone_of(content, checkpoint, network)
    if weights_digest(backbone) != probe["backbone"]:
        raise ValueError(
            f"--head {head} was trained on another backbone than the {network} of {checkpoint};"
            " train one by ibeton linear --save-head"
        )
    model = ProbedBackbone(backbone, tuple(probe["features"]), probe["weight"], probe["bias"])
    count = len(probe["bias"])
    names = class_names(probe["classes"], count)
    return Classifier(model.eval(), names, count, probe["image_size"], config)


def _finetuned(checkpoint: Path, content: dict[str, Any]) -> Classifier:
    if "classifier" not in content:
        raise ValueError(
            f"{checkpoint} holds a backbone without a classifier: give --head FILE, which"
            " ibeton linear --save-head FILE writes, or a checkpoint of ibeton finetune"
        )
    model, classes, settings = load_finetuned(checkpoint)
    names, size = class_names(classes, len(classes)), settings["image_size"]
    view = EVALUATION_VIEWS[settings["test_interpolation"]]
    return Classifier(model, names, len(classes), size, content["config"], view)


def class_names(names: list[str], count: int) -> list[str]:
    """The classes' own names; ImageNet's if a thousand have none. Numbers are no names: fine-tuning
    writes them for a set without."""
    if names and names != [str(number) for number in range(count)]:
        return list(names)
    return imagenet_wnids() if count == IMAGENET else []


def imagenet_wnids() -> list[str]:
    """ImageNet-1K's classes in their order, n01440764 first."""
    return timm_list("imagenet_synsets")


def imagenet_variant(name: str) -> list[str]:
    """The classes of ImageNet-"a" or "r", in the order of ImageNet-1K."""
    wnids = imagenet_wnids()
    return [wnids[int(index)] for index in timm_list(f"imagenet_{name}_indices")]


def timm_list(name: str) -> list[str]:
    """The lines of a list that timm ships. Read from its file: importing timm takes seconds."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        raise ValueError("ImageNet's class lists come with timm: pip install timm")
    return (Path(spec.origin).parent / "data" / "_info" / f"{name}.txt").read_text().split()
