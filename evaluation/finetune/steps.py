"""One step of fine-tuning: erase, mix, forward, backward, optimizer.

Erasing, mixing, the optimizer's groups and its schedule are timm's. Images that pass together in a
group of `mix_images` share what timm draws per batch, from (seed, step, group): several processes,
and parts of a batch, draw what one would.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ibeton.evaluation.finetune.classifier import Classifier
from ibeton.evaluation.finetune.config import FinetuneConfig
from ibeton.evaluation.finetune.loader import Batch
from ibeton.evaluation.frozen.features import normalized
from ibeton.evaluation.trainable import seed_all
from ibeton.stages import stage


def build_optimizer(classifier: Classifier, config: FinetuneConfig) -> torch.optim.Optimizer:
    """AdamW with a group for each layer and kind of decay; "lr_scale" of a group is layer_decay to
    the power of the layers behind it."""
    from timm.optim import create_optimizer_v2  # only here: takes seconds

    fused = all(p.device.type in ("cpu", "cuda") for p in classifier.parameters())
    return create_optimizer_v2(
        classifier,
        opt="adamw",
        lr=config.peak_lr(),
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
        fused=fused,
    )


def build_schedule(optimizer: torch.optim.Optimizer, config: FinetuneConfig, per_epoch: int) -> Any:
    """timm's cosine with warm-up, set by `step_update(step)`: the rates are a function of the step
    alone."""
    from timm.scheduler import CosineLRScheduler  # only here: takes seconds

    warmup = config.warmup_epochs * per_epoch
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, config.epochs * per_epoch - warmup),
        lr_min=config.min_lr,
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


def train_step(
    model: nn.Module,  # the classifier, or its DDP wrapper
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    batch: Batch,
    mixer: Mixer,
    config: FinetuneConfig,
    step: int,
    rank: int,
    group: int,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Train on a process's share of a batch in `config.accumulate` parts; the learning rates are
    those that the optimizer holds. `group`: images that mix together.

    Returns loss, acc (share of images whose heaviest target is predicted) and grad_norm, scalars
    without gradient. A step whose loss or gradients are not finite leaves weights and optimizer
    unchanged on all ranks.
    """
    optimizer.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    parts = []
    for i, (images, targets) in enumerate(_parts(batch, mixer, config, step, rank, group)):
        seed_all(config.seed, step, rank, i, 1)  # stochastic depth
        with nullcontext() if i == config.accumulate - 1 else _without_reduction(model):
            with (
                stage("student"),
                torch.autocast(device.type, dtype=dtype, enabled=dtype is not None),
            ):
                logits = model(images)
            with stage("loss"):
                loss = soft_cross_entropy(logits, targets)
            with stage("backward"):
                scaler.scale(loss / config.accumulate).backward()
        right = logits.detach().argmax(1) == targets.argmax(1)
        parts.append(torch.stack([loss.detach(), right.float().mean()]))
    with stage("optimizer"):
        scaler.unscale_(optimizer)
        limit = config.clip_grad or float("inf")
        norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        if scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
        elif norm.isfinite():
            optimizer.step()
    loss, acc = torch.stack(parts).mean(dim=0)
    return {"loss": loss, "acc": acc, "grad_norm": norm.detach()}


def _without_reduction(model: nn.Module) -> AbstractContextManager[None]:
    """Gradients of what runs in it stay on this rank until the next backward outside it."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def _parts(
    batch: Batch, mixer: Mixer, config: FinetuneConfig, step: int, rank: int, group: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The parts of a batch, each mixed group by group."""
    each, first = len(batch.images) // config.accumulate, rank * len(batch.images) // group
    for start in range(0, len(batch.images), each):
        with stage("copy"):
            mixed = [
                mixer(
                    batch.images[at : at + group],
                    batch.labels[at : at + group],
                    step,
                    first + at // group,
                )
                for at in range(start, start + each, group)
            ]
            images, targets = (torch.cat(tensors) for tensors in zip(*mixed, strict=True))
        yield images, targets
