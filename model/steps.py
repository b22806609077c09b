"""One training step, in the published order.

A step has three parts, so that a CUDA graph can hold the second and the third: what the host
decides (`Step.inputs`), forward and backward (`compute_gradients`), and the update
(`update_weights`). The host waits for the device in none of them, unless the host must tell the
optimizer whether to step (SGD, LARS, a sharded one).
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ibeton.distributed import without_reduction
from ibeton.model.fused.update import FusedUpdate
from ibeton.model.ibot import IBOT
from ibeton.model.masking import MaskedPatches, bucket_size, masked_patches, to_device
from ibeton.model.optim import AdamW, cancel_last_layer_gradients, clip_gradients
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
    """Forward, backward, clip, freeze, optimizer, teacher.

    `clip_grad` 0 does not clip; `freeze_last_layer` is in epochs; `autocast_dtype` None computes
    in the parameters' own dtype, float16 requires a `scaler` (else ValueError). `ibot.micro_steps`
    is the number of equal parts in which the batch passes, which must divide it (else ValueError):
    less memory for the same step, as all parts use the same centers, which move once, by the mean
    over all. (Batch norm in the head takes its statistics per part.)

    Returns scalars without gradient: those of `IBOTLoss.forward`, `grad_norm` (L2 over all
    gradients, before clipping) and `finite` (bool). A step whose loss or gradients are not finite,
    on any rank, is skipped on all: weights, optimizer, teacher, centers and batch statistics do
    not change. The published trainer differs: when fp16 gradients overflow it skips the
    optimizer, but moves centers and teacher; when the loss is not finite it exits before the
    backward.
    """
    step = Step(ibot, optimizer, scaler, clip_grad, freeze_last_layer, autocast_dtype)
    inputs = step.inputs(global_crops, local_crops, masks, epoch, lr, weight_decay, momentum)
    metrics = step.run(inputs.on(global_crops.device, takes_scalars(optimizer)), epoch)
    set_rates(optimizer, lr, weight_decay)  # numbers again, for those who read them
    return metrics


class StepInputs(NamedTuple):
    """Everything that changes from step to step, P micro-steps of at most M masked patches."""

    global_crops: Tensor  # [V, B, 3, S, S]
    local_crops: Tensor | None  # [L, B, 3, s, s]
    masks: Tensor  # bool [V, B, h, w]
    places: Tensor  # int64 [P, M], see `MaskedPatches`
    weight: Tensor  # float64 [P, M]
    rates: Tensor  # float64 [5]: lr, weight decay, momentum, temperatures of class and patches

    def on(self, device: torch.device, with_rates: bool) -> "StepInputs":
        """The same on `device`; the rates stay on the host unless `with_rates`."""
        moved = StepInputs(*(None if t is None else to_device(t, device) for t in self))  # type: ignore[arg-type]
        return moved if with_rates else moved._replace(rates=self.rates)


class Gradients(NamedTuple):
    """What the update needs of forward and backward, beside the gradients themselves."""

    terms: list[dict[str, Tensor]]  # of the loss, for each micro-step
    batch_means: Tensor  # [P, K + K2], see `IBOTLoss.forward`
    statistics: list[Tensor]  # of batch norms, before the step


def takes_scalars(optimizer: Optimizer) -> bool:
    """Whether the optimizer reads learning rate and decay on the device."""
    on_cuda = all(p.is_cuda for group in optimizer.param_groups for p in group["params"])
    return on_cuda and isinstance(optimizer, AdamW)


@dataclass
class Step:
    """The training step of a run. See `training_step` for the settings. `padded`: masked patches
    are padded to a bucket on a CPU too. Raises ValueError for float16 without a scaler."""

    ibot: IBOT
    optimizer: Optimizer
    scaler: torch.amp.GradScaler | None
    clip_grad: float = 3.0
    freeze_last_layer: int = 1
    autocast_dtype: torch.dtype | None = None
    padded: bool = False

    def __post_init__(self) -> None:
        if self.autocast_dtype is torch.float16 and self.scaler is None:
            raise ValueError(
                "float16 needs a GradScaler: small gradients vanish without loss scaling"
            )
        self._update = FusedUpdate(self.ibot, self.optimizer, self.clip_grad)

    def inputs(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None,
        masks: Tensor,
        epoch: int,
        lr: float,
        weight_decay: float,
        momentum: float,
    ) -> StepInputs:
        """What the host decides: masked patches and rates, on the CPU if `masks` are. Raises
        ValueError for a batch that the micro-steps do not divide, or an epoch beyond the
        schedule."""
        images, parts = global_crops.shape[1], self.ibot.micro_steps
        if images % parts:
            raise ValueError(f"--micro-steps {parts} does not divide a batch of {images} images")
        padded = self.padded or global_crops.is_cuda or parts > 1
        rows = bucket_size(masks, parts) if padded else None
        patches = [masked_patches(part, masks.device, rows) for part in masks.chunk(parts, dim=1)]
        rates = (lr, weight_decay, momentum, *self.ibot.loss.temperatures(epoch))
        return StepInputs(
            global_crops,
            local_crops,
            masks,
            torch.stack([part.places for part in patches]),
            torch.stack([part.weight for part in patches]),
            torch.tensor(rates, dtype=torch.float64),
        )

    def is_frozen(self, epoch: int) -> bool:
        """Whether the prototypes do not learn in this epoch."""
        return epoch < self.freeze_last_layer

    def run(self, inputs: StepInputs, epoch: int) -> dict[str, Tensor]:
        """The whole step on `inputs`, on the device. Returns the metrics of `training_step`."""
        return self.update_weights(inputs, epoch, self.compute_gradients(inputs, epoch))

    def compute_gradients(self, inputs: StepInputs, epoch: int) -> Gradients:
        """Forward and backward of all micro-steps. The gradients are scaled by the scaler."""
        ibot, dtype = self.ibot, self.autocast_dtype
        self.optimizer.zero_grad(set_to_none=True)
        before = [buffer.clone() for buffer in self._statistics()]
        device, parts = inputs.global_crops.device, len(inputs.places)
        temps = to_device(inputs.rates[3:], device)  # kernels read them there
        crops = inputs.global_crops.chunk(parts, dim=1)
        local = (
            [None] * parts if inputs.local_crops is None else inputs.local_crops.chunk(parts, dim=1)
        )
        masks = inputs.masks.chunk(parts, dim=1)
        terms, batch_means = [], []
        for i in range(parts):
            patches = MaskedPatches(inputs.places[i], inputs.weight[i])
            with nullcontext() if i == parts - 1 else without_reduction(ibot.student_call):
                with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                    part, means = ibot(crops[i], local[i], masks[i], epoch, patches, temps)
                with stage("backward"):
                    upstream = _nan_if_not_finite(part["loss"].detach())
                    upstream = upstream if parts == 1 else upstream / parts
                    scaler = self.scaler
                    part["loss"].backward(upstream if scaler is None else scaler.scale(upstream))
            terms.append({name: term.detach() for name, term in part.items()})
            batch_means.append(means)
        means = batch_means[0].unsqueeze(0) if parts == 1 else torch.stack(batch_means)
        return Gradients(terms, means, before)

    def _statistics(self) -> Iterator[Tensor]:
        """Buffers that the forward changes: statistics of batch norms."""
        return (b for module in (self.ibot.student, self.ibot.teacher) for b in module.buffers())

    def update_weights(
        self, inputs: StepInputs, epoch: int, computed: Gradients, reduced: bool = False
    ) -> dict[str, Tensor]:
        """Centers, clipping, optimizer, teacher; skipped on the device if a gradient is not finite.
        `reduced`: `computed.batch_means` are the same on all ranks already."""
        ibot = self.ibot
        if self._update.runs():
            with stage("optimizer"):
                frozen = self.is_frozen(epoch)
                norm, skipped = self._update(inputs.rates, self.scaler, frozen)
                cancel_last_layer_gradients(ibot.student, epoch, self.freeze_last_layer)
        else:
            norm, skipped = self._update_plainly(inputs, epoch)
        for buffer, old in zip(self._statistics(), computed.statistics, strict=True):
            torch.where(skipped, old, buffer, out=buffer)
        with stage("loss"):
            ibot.loss.update_centers(list(computed.batch_means), reduced, skipped)
        parts = computed.terms
        metrics = parts[0]
        if len(parts) > 1:
            metrics = {name: torch.stack([part[name] for part in parts]).mean() for name in metrics}
        return metrics | {"grad_norm": norm, "finite": ~skipped}

    def _update_plainly(self, inputs: StepInputs, epoch: int) -> tuple[Tensor, Tensor]:
        """Clip, step, and move the teacher. Returns the norm of all gradients before clipping, and
        whether nothing changed because it is not finite."""
        optimizer, scaler, student = self.optimizer, self.scaler, self.ibot.student
        rates = inputs.rates.unbind() if inputs.rates.is_cuda else inputs.rates.tolist()
        lr, weight_decay, momentum = rates[:3]
        set_rates(optimizer, lr, weight_decay)
        with stage("optimizer"):
            if scaler is not None:
                scaler.unscale_(optimizer)
            norms = clip_gradients(student.parameters(), self.clip_grad)
            norm = norms.norm()
            skipped = ~norm.isfinite()  # the same on all ranks, as the gradients are
            cancel_last_layer_gradients(student, epoch, self.freeze_last_layer)
            if scaler is not None and scaler.is_enabled():  # it has checked the gradients itself
                scaler.step(optimizer)
                scaler.update()
            else:
                _step_unless(skipped, optimizer)
        with stage("ema"):
            self.ibot.update_teacher(momentum, skipped)
        return norm, skipped


def _nan_if_not_finite(loss: Tensor) -> Tensor:
    """The gradient of the loss itself: 1, or NaN unless it is finite. Ranks average their
    gradients, so that all of them see it without another message."""
    return 1 + 0 * loss


def _step_unless(skipped: Tensor, optimizer: Optimizer) -> None:
    """The optimizer's step, unless `skipped`. Fused optimizers check it on the device, by the
    attributes that a GradScaler would set."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        vars(optimizer).update(grad_scale=None, found_inf=skipped.float())
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif not skipped:
        optimizer.step()


def set_rates(optimizer: Optimizer, lr: float | Tensor, weight_decay: float | Tensor) -> None:
    """Learning rate of every group, and weight decay of the first, the only one that decays.
    Tensors are scalars on the device, see `AdamW`."""
    if isinstance(lr, Tensor) and isinstance(weight_decay, Tensor):
        lr, weight_decay = lr.float(), weight_decay.float()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay
