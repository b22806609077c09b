"""Finds where a loss or gradient becomes non-finite, by repeating the step with hooks."""

from typing import Any

import torch
from torch import Tensor, nn

from ibeton.model import IBOT
from ibeton.pipeline import Batch

_NAMED = 8  # tensors named in one list; the others are counted


def diagnose(
    ibot: IBOT, batch: Batch, epoch: int, dtype: torch.dtype | None, scale: float
) -> dict[str, Any]:
    """Find the non-finite values of the step on `batch` with the current weights. Ranks do not
    communicate. `scale` is the loss scale. Leaves `ibot` without gradients.

    Returns "images" (indices of photos with non-finite pixels), "weights" and "gradients" (names;
    gradients in the order of the backward pass), "layers" (modules in the order of the forward
    pass), "terms" (of the loss), and "alone" (indices of photos that cause it in a batch of one).
    """
    call, ibot.__dict__["student_call"] = ibot.student_call, ibot.student  # off DDP
    synced = [m for m in ibot.modules() if isinstance(m, nn.SyncBatchNorm) and m.training]
    for norm in synced:
        norm.eval()  # by its running statistics: ranks repeat different numbers of steps
    report: dict[str, Any] = {
        "images": batch.indices[_bad_images(batch)].tolist(),
        "weights": [name for name, tensor in ibot.state_dict().items() if not _finite(tensor)],
    }
    layers: list[str] = []
    gradients: list[str] = []
    hooks: list[Any] = []
    for name, module in ibot.named_modules():
        if name and name != "loss":
            hooks.append(module.register_forward_hook(_noting(name, layers)))
    for name, parameter in ibot.student.named_parameters():
        if parameter.requires_grad:
            hooks.append(
                parameter.register_post_accumulate_grad_hook(_noting_gradient(name, gradients))
            )
    images = len(batch.indices)
    for i in range(ibot.micro_steps):  # for the memory, as in training
        part = slice(i * images // ibot.micro_steps, (i + 1) * images // ibot.micro_steps)
        terms = _step(ibot, batch, part, epoch, dtype, scale)
        report["terms"] = {name: float(value) for name, value in terms.items()}
        if gradients or not _finite(terms["loss"]):
            break
    report["layers"], report["gradients"] = list(layers), list(gradients)
    report["alone"] = []
    for i, index in enumerate(batch.indices.tolist()):
        gradients.clear()
        terms = _step(ibot, batch, slice(i, i + 1), epoch, dtype, scale)
        if gradients or not _finite(terms["loss"]):
            report["alone"].append(index)
    for hook in hooks:
        hook.remove()
    for norm in synced:
        norm.train()
    ibot.__dict__["student_call"] = call
    return report


def sentences(report: dict[str, Any], names: dict[int, str]) -> list[str]:
    """A report of `diagnose` in words. `names`: photos by index. "diverging_since" is the first
    step with a finite but implausible loss. Photos are named only if they can be the cause: not if
    weights are non-finite, the run was diverging, or most of the batch fails."""

    def photos(indices: list[int]) -> str:
        return _some([f"{index} ({names[index]})" for index in indices])

    terms = ", ".join(
        f"{name} {report['terms'][name]}" for name in ("cls", "patch", "teacher_entropy")
    )
    lines = [f"loss {report['terms']['loss']}, of which {terms}"]
    if report["weights"]:
        lines.append("non-finite weights: " + _some(report["weights"]))
    if report["images"]:
        lines.append("non-finite pixels: photo " + photos(report["images"]))
    if report["layers"]:
        lines.append("first layer with a non-finite output: " + report["layers"][0])
    if report["gradients"]:
        lines.append("non-finite gradients, from the loss down: " + _some(report["gradients"]))
    since, alone = report.get("diverging_since"), report["alone"]
    if since is not None:
        lines.append(
            f"losses were implausible from step {since} on: the run was diverging because of its"
            " weights or options (--lr), not because of the photos of this step"
        )
    elif report["weights"]:
        lines.append("the cause is the weights, not the photos of this step")
    elif not report["images"] and len(alone) > len(names) / 2:
        lines.append(
            f"{len(alone)} of {len(names)} photos of the batch cause it on their own: the cause is"
            " the weights or options, not the photos"
        )
    elif alone and not report["images"]:
        lines.append("photos that cause it on their own: " + photos(alone))
    if not (report["layers"] or report["gradients"] or report["weights"]):
        lines.append("the step is finite when repeated: suspect the hardware")
    return lines


def _step(
    ibot: IBOT, batch: Batch, part: slice, epoch: int, dtype: torch.dtype | None, scale: float
) -> dict[str, Tensor]:
    """Forward and backward of some images of the batch, and nothing else."""
    ibot.zero_grad(set_to_none=True)
    device = batch.global_crops.device.type
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        terms, _ = ibot(
            batch.global_crops[:, part], batch.local_crops[:, part], batch.masks[:, part], epoch
        )
    (terms["loss"] * scale).backward()
    ibot.zero_grad(set_to_none=True)
    return {name: term.detach() for name, term in terms.items()}


def _noting(name: str, layers: list[str]) -> Any:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple | list) else [output]
        if not all(_finite(x) for x in outputs if isinstance(x, Tensor)) and name not in layers:
            layers.append(name)

    return note


def _noting_gradient(name: str, gradients: list[str]) -> Any:
    def note(parameter: Tensor) -> None:
        if parameter.grad is not None and not _finite(parameter.grad):
            gradients.append(name)

    return note


def _bad_images(batch: Batch) -> Tensor:
    """bool [B] on the CPU: images with a pixel that is not finite."""
    bad = ~batch.global_crops.isfinite().flatten(2).all(dim=2).all(dim=0)
    if len(batch.local_crops):
        bad |= ~batch.local_crops.isfinite().flatten(2).all(dim=2).all(dim=0)
    return bad.cpu()


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
