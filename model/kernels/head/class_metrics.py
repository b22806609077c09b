"""Metrics of the class logits: the entropy of the teacher's targets, and how often teacher
and student agree on the likeliest prototype.

In shapes: V global views, B images, K prototypes.
"""

import torch
from torch import Tensor

from ibeton.model.kernels.launch import jit, kernels_run_on, launch, tl, triton

BLOCK = 4096  # logits that a program holds at a time


def class_metrics_reference(
    teacher: Tensor,  # [V * B, K] logits
    student: Tensor,  # [V * B or more, K] logits
    center: Tensor,  # [K]
    temp: float | Tensor,
    views: int,
) -> tuple[Tensor, Tensor]:
    """Mean entropy in nats of softmax((teacher - center) / temp), and the share of images whose
    first teacher view and second student view have their largest logit at the same place."""
    wide = teacher.to(torch.promote_types(teacher.dtype, torch.float32))
    targets = ((wide - center) / temp).softmax(dim=-1)
    entropy = -torch.special.xlogy(targets, targets).sum(dim=-1).mean()
    batch = len(teacher) // views
    agree = teacher[:batch].argmax(dim=-1) == student[batch : 2 * batch].argmax(dim=-1)
    return entropy, agree.float().mean()


def class_metrics(
    teacher: Tensor, student: Tensor, center: Tensor, temp: float | Tensor, views: int
) -> tuple[Tensor, Tensor]:
    """`class_metrics_reference`, by the kernel where it runs."""
    if not kernels_run_on(teacher):
        return class_metrics_reference(teacher, student, center, temp, views)
    rows, prototypes = teacher.shape
    found = torch.empty(2, rows, dtype=torch.float32, device=teacher.device)
    launch(
        _class_metrics_kernel,
        (rows,),
        *(teacher.contiguous(), student.contiguous(), center, temp, found, rows, rows // views),
        TEMP_ON_DEVICE=isinstance(temp, Tensor),
        PROTOTYPES=prototypes,
        BLOCK=min(BLOCK, triton.next_power_of_2(prototypes)),
        num_warps=8,
    )
    return found.mean(dim=1).unbind()  # type: ignore[return-value]


@jit
def _class_metrics_kernel(  # type: ignore[no-untyped-def]
    teacher,  # [V * B, K]
    student,  # [V * B or more, K]
    center,  # float32 [K]
    temp,  # a number, or float64 []
    found,  # float32 [2, V * B], out; the second row is to be averaged with the first B alone
    rows,  # V * B
    batch,  # B
    TEMP_ON_DEVICE: tl.constexpr,
    PROTOTYPES: tl.constexpr,  # K
    BLOCK: tl.constexpr,  # a power of two
):
    """One row of the teacher, block by block."""
    row = tl.program_id(0)
    if TEMP_ON_DEVICE:
        sharpness = 1.0 / tl.load(temp).to(tl.float32)
    else:
        sharpness = 1.0 / temp
    teacher += row.to(tl.int64) * PROTOTYPES
    student += (row + batch).to(tl.int64) * PROTOTYPES
    has_partner = row < batch
    top = -1e30  # finite, as it is subtracted
    total = 0.0
    slope = 0.0  # sum of exp(t - top) * (t - top)
    best = float("-inf")
    best_at = 0
    partner = float("-inf")
    partner_at = 0
    for start in range(0, PROTOTYPES, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k < PROTOTYPES
        logit = tl.load(teacher + k, mask=inside, other=float("-inf")).to(tl.float32)
        highest = tl.max(logit, axis=0)
        best_at = tl.where(highest > best, start + tl.argmax(logit, axis=0), best_at)
        best = tl.maximum(best, highest)
        scaled = (logit - tl.load(center + k, mask=inside, other=0.0)) * sharpness
        higher = tl.maximum(top, tl.max(scaled, axis=0))
        shrink = tl.exp(top - higher)
        slope = shrink * (slope + (top - higher) * total)
        scaled = tl.where(inside, scaled - higher, 0.0)
        weight = tl.where(inside, tl.exp(scaled), 0.0)
        total = total * shrink + tl.sum(weight, axis=0)
        slope += tl.sum(weight * scaled, axis=0)
        top = higher
        other = tl.load(student + k, mask=inside & has_partner, other=float("-inf"))
        other = other.to(tl.float32)
        highest = tl.max(other, axis=0)
        partner_at = tl.where(highest > partner, start + tl.argmax(other, axis=0), partner_at)
        partner = tl.maximum(partner, highest)
    tl.store(found + row, tl.log(total) - slope / total)
    # All rows are averaged, though only the first view counts.
    agree = tl.where(has_partner & (best_at == partner_at), rows / batch, 0.0)
    tl.store(found + rows + row, agree)
