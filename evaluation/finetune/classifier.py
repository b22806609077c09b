"""A backbone with a linear classifier on its class token, and how both are read back."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ibeton.evaluation.finetune.config import FinetuneConfig
from ibeton.evaluation.trainable import layers_of, trainable_backbone
from ibeton.model.checkpoint import load_checkpoint
from ibeton.model.checkpoint.files import backbone_state, check_tensors
from ibeton.model.config import ModelConfig
from ibeton.options import fill

INIT_STD = 0.02


class Classifier(nn.Module):
    """Images [B, 3, S, S] -> logits [B, K] from the class token (Swin: the mean of its tokens).

    `hidden` is the width of the projection head's first layer, where the classifier stands behind
    that and a GELU; 0 puts it on the token itself. State keys are `backbone.*`, `neck.*`, `head.*`.
    """

    def __init__(
        self, backbone: nn.Module, classes: int, hidden: int = 0, init_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.backbone = backbone
        width = int(cast(Any, backbone).embed_dim)
        self.neck = nn.Sequential(nn.Linear(width, hidden), nn.GELU()) if hidden else None
        self.head = nn.Linear(hidden or width, classes)
        nn.init.trunc_normal_(self.head.weight, std=INIT_STD)
        nn.init.zeros_(self.head.bias)
        self.head.weight.data.mul_(init_scale)

    def forward(self, images: Tensor) -> Tensor:
        backbone = cast(Any, self.backbone)
        if hasattr(backbone, "selected"):  # patches end before the last block's MLP
            none = torch.empty(0, dtype=torch.int64, device=images.device)
            token = backbone.selected([images], [None], none)
        else:
            token = backbone(images)[:, 0]
        return self.head(token if self.neck is None else self.neck(token))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's way to ask for layers."""
        return layers_of("backbone")

    def no_weight_decay(self) -> set[str]:
        """Names of tensors with more than one dimension that are not decayed."""
        return {
            name
            for name, _ in self.named_parameters()
            if name.endswith(("cls_token", "pos_embed", "relative_position_bias_table"))
        }


def build_classifier(config: FinetuneConfig, content: dict[str, Any], classes: int) -> Classifier:
    """A new classifier on the backbone of the checkpoint `content`, from torch's random state.

    Raises ValueError for a checkpoint without the network, of other tensors than its settings say,
    or without a projection head where --projection wants one.
    """
    path, network = config.checkpoint, config.network
    weights = backbone_state(content, network, path)
    weights.pop("masked_embed", None)
    settings = fill(ModelConfig, content["config"])
    backbone = trainable_backbone(settings, config.drop_path, config.checkpoint_blocks)
    check_tensors(f"{path}: backbone of {settings.arch}", weights, backbone.state_dict())
    first = {k: content[network].get(f"head.mlp.0.{k}") for k in ("weight", "bias")}
    if config.projection and first["weight"] is None:
        raise ValueError(
            f"{path} has no projection head, whose first layer --projection starts from: give"
            " --no-projection, or the checkpoint of a run"
        )
    hidden = len(first["weight"]) if config.projection else 0
    classifier = Classifier(backbone, classes, hidden, config.head_init_scale)
    if not config.from_scratch:
        backbone.load_state_dict(weights)
        if classifier.neck is not None:
            classifier.neck[0].load_state_dict(first)
    return classifier


def classifier_state(classifier: Classifier) -> dict[str, dict[str, Tensor]]:
    """The classifier's part of a checkpoint: the backbone under "teacher", where everything that
    reads a backbone looks for it, and what stands on it under "classifier"."""
    state = classifier.state_dict()
    return {
        "teacher": {k: v for k, v in state.items() if k.startswith("backbone.")},
        "classifier": {k: v for k, v in state.items() if not k.startswith("backbone.")},
    }


def load_classifier(
    path: str | Path, ema: bool = False
) -> tuple[Classifier, list[str], dict[str, Any]]:
    """A fine-tuned classifier in evaluation mode on the CPU, the names of its classes, and the
    settings of fine-tuning ("image_size" is that of its views).

    `ema`: with the moving average of its weights. Raises ValueError for another checkpoint.
    """
    content = load_checkpoint(path)
    if "classifier" not in content:
        raise ValueError(
            f"{path} holds a backbone without a classifier: train one by ibeton finetune"
            f" --checkpoint {path}"
        )
    state = {**content["teacher"], **content["classifier"]}
    if ema:
        if not content.get("ema"):
            raise ValueError(f"{path} holds no moving average: it was trained without --ema")
        state = content["ema"]
    hidden = state["neck.0.weight"].shape[0] if "neck.0.weight" in state else 0
    backbone = trainable_backbone(fill(ModelConfig, content["config"]), 0.0)
    classifier = Classifier(backbone, len(content["classes"]), hidden)
    check_tensors(f"{path}: classifier", state, classifier.state_dict())
    classifier.load_state_dict(state)
    return classifier.eval(), content["classes"], content["finetune"]
