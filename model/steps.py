"""One training step, in the published order."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from model.ibot import IBOT
from model.optim import cancel_last_layer_gradients, clip_gradients


def training_step(
    ibot: IBOT,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler | None,
    global_crops: Tensor,  # [V, B, 3, S, S]
    local_crops: Tensor | None,  # [L, B, 3, s, s]
    masks: Tensor,  # bool [V, B, h, w]
    *,
    epoch: int,
    lr: float,
    weight_decay: float,
    momentum: float,
    clip_grad: float = 3.0,
    freeze_last_layer: int = 1,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Forward, backward, clip, freeze, optimiser, teacher. Nothing here waits for the device.

    `clip_grad` 0 does not clip; `freeze_last_layer` is in epochs; `autocast_dtype` None computes
    in the parameters' own dtype, float16 wants a `scaler` (else ValueError). Returns scalars
    without gradient: those of `IBOTLoss.forward`, `grad_norm` (L2 over all gradients, before
    clipping) and `finite` (bool: the loss is a number). The published trainer stops where it
    is not; the caller decides when to look, and a loss that is not finite has by then reached
    the weights, unless a scaler skipped the step.
    """
    if autocast_dtype is torch.float16 and scaler is None:
        raise ValueError("float16 needs a GradScaler: small gradients vanish without loss scaling")
    set_rates(optimizer, lr, weight_decay)
    with torch.autocast(
        global_crops.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None
    ):
        terms = ibot(global_crops, local_crops, masks, epoch)
    optimizer.zero_grad(set_to_none=True)
    scaler = scaler or torch.amp.GradScaler(global_crops.device.type, enabled=False)
    scaler.scale(terms["loss"]).backward()
    scaler.unscale_(optimizer)
    norms = clip_gradients(ibot.student.parameters(), clip_grad)
    cancel_last_layer_gradients(ibot.student, epoch, freeze_last_layer)
    scaler.step(optimizer)
    scaler.update()
    ibot.update_teacher(momentum)
    metrics = {name: term.detach() for name, term in terms.items()}
    return metrics | {"grad_norm": norms.norm(), "finite": metrics["loss"].isfinite()}


def set_rates(optimizer: Optimizer, lr: float, weight_decay: float) -> None:
    """Learning rate of every group, and weight decay of the first, the only one that decays."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay
