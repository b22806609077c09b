"""The parts of a step of fine-tuning: optimizer, schedule, erasing and mixing, loss.

Erasing, mixing, the optimizer's groups and its schedule are timm's. Images that pass together in a
group of `mix_images` share what timm draws per batch, from (seed, step, group): several processes,
and parts of a batch that hold whole groups, draw what one would.
"""

from typing import Any

import torch
from torch import Tensor

from ibeton.evaluation.finetune.classifier import Classifier
from ibeton.evaluation.finetune.config import FinetuneConfig
from ibeton.evaluation.frozen.features import normalized
from ibeton.evaluation.trainable import seed_all


def build_optimizer(classifier: Classifier, config: FinetuneConfig) -> torch.optim.Optimizer:
    """AdamW with a group for each layer and kind of decay; "lr_scale" of a group is layer_decay to
    the power of the layers behind it."""
    from timm.optim import create_optimizer_v2  # only here: takes seconds

    return create_optimizer_v2(
        classifier,
        opt="adamw",
        lr=config.peak_lr(),
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
        fused=True,
    )


def build_schedule(optimizer: torch.optim.Optimizer, config: FinetuneConfig, per_epoch: int) -> Any:
    """timm's cosine with warm-up, set by `step_update(step)`: the rates are a function of the step
    alone."""
    from timm.scheduler import CosineLRScheduler  # only here: takes seconds

    warmup = config.warmup_epochs * per_epoch
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, config.epochs * per_epoch - warmup),
        lr_min=min(config.min_lr, config.peak_lr()),
        warmup_t=warmup,
        warmup_lr_init=min(config.warmup_lr, config.peak_lr()),
        warmup_prefix=True,
        t_in_epochs=False,
    )


class Mixer:
    """Batches as the loader gives them -> erased and mixed images and soft targets, on `device`."""

    def __init__(self, config: FinetuneConfig, classes: int, device: torch.device) -> None:
        from timm.data.mixup import Mixup, mixup_target
        from timm.data.random_erasing import RandomErasing

        self._device, self._seed, self._classes = device, config.seed, classes
        self._target, self._smoothing = mixup_target, config.smoothing
        self._erase = RandomErasing(config.erasing, mode="pixel", device=device)  # type: ignore[arg-type]
        self._mix: Any = None
        if config.mixes():
            self._mix = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=classes
            )

    def __call__(
        self, images: Tensor, labels: Tensor, step: int, group: int
    ) -> tuple[Tensor, Tensor]:
        """uint8 [b, 3, S, S] and int64 [b] of group number `group` of the whole batch -> float32
        images and targets [b, K]."""
        seed_all(self._seed, step, group)
        x = self._erase(normalized(images, self._device))
        labels = labels.to(self._device, non_blocking=True)
        if self._mix is not None:
            return self._mix(x, labels)
        return x, self._target(labels, self._classes, 1.0, self._smoothing)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, K] with distributions [B, K]; float32 at least."""
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)
    return -(targets * logs).sum(dim=1).mean()
