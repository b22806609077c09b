"""One training step, in the published order."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.optim import Optimizer

from ibeton.model.ibot import IBOT
from ibeton.model.optim import cancel_last_layer_gradients, clip_gradients
from ibeton.stages import stage


def training_step(
    ibot: IBOT,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler | None,
    global_crops: Tensor,  # [V, B, 3, S, S]
    local_crops: Tensor | None,  # [L, B, 3, s, s]
    masks: Tensor,  # bool [V, B, h, w], best on the CPU: see `model.masking`
    *,
    epoch: int,
    lr: float,
    weight_decay: float,
    momentum: float,
    clip_grad: float = 3.0,
    freeze_last_layer: int = 1,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Forward, backward, clip, freeze, optimizer, teacher. Nothing here waits for the device,
    unless the optimizer must be told from here whether to step (SGD, LARS, a sharded one).

    `clip_grad` 0 does not clip; `freeze_last_layer` is in epochs; `autocast_dtype` None computes
    in the parameters' own dtype, float16 wants a `scaler` (else ValueError). `ibot.micro_steps`
    takes the batch in so many equal parts, which must divide it (else ValueError): less memory, the
    same step, as all parts meet the same centers, which move once, by the mean over all. (Batch
    norm in the head takes its statistics part by part.)

    Returns scalars without gradient: those of `IBOTLoss.forward`, `grad_norm` (L2 over all
    gradients, before clipping) and `finite` (bool). A step whose loss or gradients are not finite,
    on any rank, is skipped on all: weights, optimizer, teacher, centers and batch statistics
    stay as they were. The published trainer differs: when fp16 gradients overflow it skips the
    optimizer, but moves centers and teacher; when the loss is not finite it exits before the
    backward.
    """
    if autocast_dtype is torch.float16 and scaler is None:
        raise ValueError("float16 needs a GradScaler: small gradients vanish without loss scaling")
    images, micro_steps = global_crops.shape[1], ibot.micro_steps
    if images % micro_steps:
        raise ValueError(f"--micro-steps {micro_steps} does not divide a batch of {images} images")
    set_rates(optimizer, lr, weight_decay)
    optimizer.zero_grad(set_to_none=True)
    scaler = scaler or torch.amp.GradScaler(global_crops.device.type, enabled=False)
    buffers = list(ibot.buffers())
    before = [buffer.clone() for buffer in buffers]
    parts, batch_means = [], []
    for i in range(micro_steps):
        part = slice(i * images // micro_steps, (i + 1) * images // micro_steps)
        local_part = None if local_crops is None else local_crops[:, part]
        last = i == micro_steps - 1
        with nullcontext() if last else ibot.without_reduction():
            with torch.autocast(
                global_crops.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None
            ):
                terms, means = ibot(global_crops[:, part], local_part, masks[:, part], epoch)
            with stage("backward"):
                loss = _none_if_not_finite(terms["loss"])
                scaler.scale(loss / micro_steps).backward()
        batch_means.append(means)
        parts.append({name: term.detach() for name, term in terms.items()})
    with stage("comm"):  # one all-reduce, and little else
        ibot.loss.update_centers(batch_means)
    with stage("optimizer"):
        scaler.unscale_(optimizer)
        norms = clip_gradients(ibot.student.parameters(), clip_grad)
        skipped = ~norms.norm().isfinite()  # the same on all ranks, as the gradients are
        cancel_last_layer_gradients(ibot.student, epoch, freeze_last_layer)
        if scaler.is_enabled():  # it has seen the gradients itself
            scaler.step(optimizer)
            scaler.update()
        else:
            _step_unless(skipped, optimizer)
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(torch.where(skipped, old, buffer))
    with stage("ema"):
        ibot.update_teacher(momentum, skipped)
    metrics = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
    return metrics | {"grad_norm": norms.norm(), "finite": ~skipped}


def _none_if_not_finite(loss: Tensor) -> Tensor:
    """The loss, with gradients that are no numbers where it is none: as the ranks average their
    gradients, all of them learn of it, without a word more to each other."""
    return loss * torch.where(loss.isfinite(), 1.0, torch.nan)


def _step_unless(skipped: Tensor, optimizer: Optimizer) -> None:
    """The optimizer's step, unless `skipped`. Fused optimizers look at it on the device, by the
    attributes that a GradScaler would set."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        vars(optimizer).update(grad_scale=None, found_inf=skipped.float())
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif not skipped:
        optimizer.step()


def set_rates(optimizer: Optimizer, lr: float, weight_decay: float) -> None:
    """Learning rate of every group, and weight decay of the first, the only one that decays."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay
