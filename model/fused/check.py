"""Before a run: do the kernels compute on this device what PyTorch's own operations compute?

The tests prove the kernels in Triton's interpreter and compile them for each architecture. A GPU,
driver or version of Triton that none of them has seen is tested here, by one small step.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from ibeton.command import Failure
from ibeton.model.config import SWINS, ModelConfig
from ibeton.model.ibot import build
from ibeton.model.kernels.launch import switch_off
from ibeton.model.optim import build_optimizer
from ibeton.model.steps import Step, takes_scalars

IMAGES, MASKED = 2, 0.3
# Rounding in half precision moves a loss or the gradient of a tensor by a percent or so, and turns
# few of the signs that AdamW's first step follows. A wrong kernel changes far more.
CLOSE, ALIGNED = 0.1, 0.8
SCALES = (2.0**10, 2.0**5, 1.0)  # of the loss in float16: the first without overflow is taken


class _Taken(NamedTuple):
    """The results of a step."""

    terms: dict[str, float]  # of the loss
    gradients: dict[str, Tensor]  # of the loss times the scale, float32, by name of the parameter
    moves: dict[str, Tensor]  # of student and teacher, all parameters in one vector


def kernel_fault(
    config: ModelConfig,
    crop_sizes: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype | None,
) -> str:
    """Why the kernels must not be used for a run of `config` with global and local crops of
    `crop_sizes` pixels on `device` with autocast to `dtype` (None: no autocast); "" if a step of
    two images and two blocks agrees with one without kernels: terms of the loss, gradients, and the
    movement of student and teacher. Switches kernels on; draws no random number of the caller.
    Raises Failure if a kernel has left the device unusable.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        switch_off(True)
        try:
            for scale in SCALES if dtype is torch.float16 else SCALES[-1:]:
                plain = _step(config, crop_sizes, device, dtype, scale)
                infinite = [n for n, g in plain.gradients.items() if not g.isfinite().all()]
                if not infinite:
                    break
            else:
                return (
                    "the two cannot be compared: without the kernels too the gradient of"
                    f" {infinite[0]} is not finite"
                )
        finally:
            switch_off(False)
        try:
            fused = _step(config, crop_sizes, device, dtype, scale)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a compiler, driver, or kernel: any kind
            fault = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['?'])[0]}"
            _check_usable(device, fault)
            return fault
    return next(_differences(fused, plain), "")


def _differences(fused: _Taken, plain: _Taken) -> Iterator[str]:
    for name, term in plain.terms.items():
        found = fused.terms[name]
        if not abs(found - term) <= CLOSE * abs(term):
            yield f"their {name} is {found:.4g} instead of {term:.4g}"
    norms = {name: gradient.norm().item() for name, gradient in plain.gradients.items()}
    floor = 1e-3 * max(norms.values())  # some gradients are zero but for rounding
    for name, expected in plain.gradients.items():
        away = (fused.gradients[name] - expected).norm().item()
        if not away <= CLOSE * norms[name] + floor:
            yield f"their gradient of {name} is {away:.2g} away from one of norm {norms[name]:.2g}"
    for name, move in plain.moves.items():
        cosine = torch.cosine_similarity(fused.moves[name], move, dim=0).item()
        if not cosine >= ALIGNED:
            yield f"their update of the {name} has another direction (cosine {cosine:.2f})"


def _step(
    config: ModelConfig,
    crop_sizes: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype | None,
    scale: float,
) -> _Taken:
    torch.manual_seed(0)
    small = config if config.arch in SWINS else replace(config, depth=2)
    # Without stochastic depth, which of two images would leave too little to compare.
    whole = replace(small, drop_path=0.0, micro_steps=1, epochs=1)
    whole = replace(whole, warmup_teacher_temp_epochs=0, pred_start_epoch=0)
    ibot = build(whole).to(device)
    half = dtype is torch.float16
    scaler = torch.amp.GradScaler(device.type, init_scale=scale) if half else None
    step = Step(ibot, build_optimizer(ibot.student), scaler, 3.0, 0, dtype)
    side = crop_sizes[0] // config.patch_size
    views = (config.global_crops_number, config.local_crops_number)
    global_crops, local_crops = (
        torch.randn(count, IMAGES, 3, size, size).to(device) if count else None
        for count, size in zip(views, crop_sizes, strict=True)
    )
    assert global_crops is not None
    masks = torch.rand(views[0], IMAGES, side, side) < MASKED
    networks = {"student": ibot.student, "teacher": ibot.teacher}
    before = {name: _vector(network) for name, network in networks.items()}
    inputs = step.inputs(global_crops, local_crops, masks, 0, 1e-3, 0.04, 0.5)
    inputs = inputs.on(device, takes_scalars(step.optimizer))
    computed = step.compute_gradients(inputs, 0)
    gradients = {
        name: p.grad.float().clone()
        for name, p in ibot.student.named_parameters()
        if p.grad is not None
    }
    metrics = step.update_weights(inputs, 0, computed)
    terms = {name: metrics[name].item() for name in ("loss", "cls", "patch")}
    moves = {name: _vector(network) - before[name] for name, network in networks.items()}
    return _Taken(terms, gradients, moves)


def _vector(network: nn.Module) -> Tensor:
    return parameters_to_vector(network.parameters()).detach().clone()


def _check_usable(device: torch.device, fault: str) -> None:
    """Raise Failure if the device no longer computes: a kernel that reads or writes where it must
    not makes the device unusable for the process."""
    try:
        torch.ones(1, device=device).add(1).item()
    except Exception as error:
        raise Failure(f"a kernel broke the device ({fault}): give --kernels off") from error
