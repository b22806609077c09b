"""Cross-entropy of the student's logits with the teacher's, and its gradient in the same pass.

In shapes: R student rows, T teacher rows, K prototypes, Q teacher rows at most for a student row.
A class token of the student is compared with one or more teacher views, a masked patch with one.
Cross-entropy is linear in its target, so the targets of a student row are added up first.

On CUDA a Triton program takes a row: rows that fit stay in registers, so that each logit is read
once; longer ones take two sweeps. Elsewhere rows go in chunks that stay in the cache. Both compute
the gradient of the logits at once instead of keeping what autograd would need for it.
"""

from typing import Any

import torch
from torch import Tensor

from ibeton.model.kernels.launch import jit, kernels_run_on, launch, tl, triton

CHUNK = 1 << 19  # logits of one chunk: 2 MiB in float32
BLOCK = 2048  # logits that a Triton program holds at a time where it takes two sweeps
WHOLE = 8192  # prototypes up to which a program holds whole rows
# Gradients wait for the backward as (softmax - target), within +-Q. In fp16 the likely values of
# 1 / K are close to its smallest normal number, 6e-5; times 2^12 they are far from both ends.
FP16_LIFT = 4096.0


def upcast(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy_reference(
    student: Tensor,  # [R, K] logits
    teacher: Tensor,  # [T, K] logits
    center: Tensor,  # [K]
    pairs: Tensor | None,  # int64 [R, Q], rows of the teacher, -1 for none; None: row r for row r
    weight: Tensor,  # [R]
    student_temp: float,
    teacher_temp: float | Tensor,
) -> Tensor:
    """Sum over rows r of weight[r] * sum over q of the cross-entropy of
    softmax((teacher[pairs[r, q]] - center) / teacher_temp) and softmax(student[r] / student_temp).
    """
    pairs = _pairs(pairs, student)
    log_p = (upcast(student) / student_temp).log_softmax(dim=-1)
    targets = ((upcast(teacher.detach()) - center) / teacher_temp).softmax(dim=-1)
    seen = pairs >= 0
    target = targets[pairs.clamp(min=0)] * seen.unsqueeze(-1)  # [R, Q, K]
    return -(weight * (target.sum(dim=1) * log_p).sum(dim=-1)).sum()


def _pairs(pairs: Tensor | None, student: Tensor) -> Tensor:
    if pairs is None:
        return torch.arange(len(student), device=student.device).unsqueeze(1)
    return pairs


def cross_entropy(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    pairs: Tensor | None,
    weight: Tensor,
    student_temp: float,
    teacher_temp: float | Tensor,
) -> Tensor:
    """As `cross_entropy_reference`, a scalar in float32 (float64 for float64 logits), with a
    gradient for `student` alone. Logits are fp16, bf16, fp32 or fp64; computes in fp32 at least.
    Raises ValueError for shapes that do not fit together."""
    rows, prototypes = student.shape
    if teacher.shape[1:] != (prototypes,) or center.shape != (prototypes,):
        raise ValueError(
            f"student {list(student.shape)}, teacher {list(teacher.shape)}, center"
            f" {list(center.shape)}: expected the same number of prototypes"
        )
    fits = len(teacher) == rows if pairs is None else pairs.dim() == 2 and len(pairs) == rows
    if not fits or weight.shape != (rows,):
        of = "none" if pairs is None else list(pairs.shape)
        raise ValueError(
            f"pairs {of}, teacher {list(teacher.shape)}, and weight {list(weight.shape)} for {rows}"
            " student rows: expected one entry per row"
        )
    return _CrossEntropy.apply(student, teacher, center, pairs, weight, student_temp, teacher_temp)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        center: Tensor,
        pairs: Tensor | None,
        weight: Tensor,
        student_temp: float,
        teacher_temp: float | Tensor,
    ) -> Tensor:
        lift = FP16_LIFT if student.dtype is torch.float16 else 1.0
        temps = (student_temp, teacher_temp)
        by_row = rows_by_triton if kernels_run_on(student) else rows_by_chunk
        loss, difference = by_row(
            student, teacher, center, pairs, weight, *temps, lift, ctx.needs_input_grad[0]
        )
        ctx.save_for_backward(difference, weight)
        ctx.scale = 1 / (student_temp * lift)
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        difference, weight = ctx.saved_tensors
        gradient = torch.empty_like(difference)
        if kernels_run_on(difference):
            rows, width = difference.shape
            launch(
                _scale_rows_kernel,
                (rows, triton.cdiv(width, BLOCK)),
                *(difference, weight, grad, gradient, ctx.scale, width),
                BLOCK=BLOCK,
                num_warps=4,
            )
        else:
            factor = (grad * weight.to(grad.dtype) * ctx.scale).unsqueeze(1)
            # `out` lets float32 factors meet half precision without a float32 copy of all logits.
            torch.mul(difference, factor, out=gradient)
        return gradient, None, None, None, None, None, None


def rows_by_chunk(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    pairs: Tensor | None,
    weight: Tensor,
    student_temp: float,
    teacher_temp: float | Tensor,
    lift: float,
    want_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Weighted loss of each row [R], and lift * (n * softmax - summed targets) [R, K] in the dtype
    of the student, n being the row's number of targets. On any device."""
    pairs = _pairs(pairs, student)
    loss = upcast(student.new_empty(0)).new_empty(len(student))
    difference = torch.empty_like(student) if want_gradient else None

    def soften(logits: Tensor) -> Tensor:
        return upcast(logits).sub(center).div_(teacher_temp).softmax(dim=-1)

    often = pairs.numel() > len(teacher)  # class tokens: a teacher row meets many student rows
    if often:
        teacher = soften(teacher)
    step = max(1, CHUNK // student.shape[1])
    for start in range(0, len(student), step):
        rows = slice(start, start + step)
        log_p = upcast(student[rows]).div(student_temp).log_softmax(dim=-1)
        targets = torch.zeros_like(log_p)
        for row in pairs[rows].unbind(dim=1):
            some = teacher[row.clamp(min=0)]
            some = some if often else soften(some)
            targets.addcmul_(some, (row >= 0).to(targets.dtype).unsqueeze(1))
        loss[rows] = -torch.linalg.vecdot(targets, log_p)
        if difference is not None:
            count = (pairs[rows] >= 0).sum(dim=1, keepdim=True)
            difference[rows] = log_p.exp_().mul_(count).sub_(targets).mul_(lift)
    return weight.to(loss.dtype) * loss, difference


def rows_by_triton(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    pairs: Tensor | None,
    weight: Tensor,
    student_temp: float,
    teacher_temp: float | Tensor,
    lift: float,
    want_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """`rows_by_chunk` by the kernel, for fp16, bf16 and fp32."""
    student, teacher = student.contiguous(), teacher.contiguous()
    rows, prototypes = student.shape
    loss = torch.empty(rows, dtype=torch.float32, device=student.device)
    difference = torch.empty_like(student) if want_gradient else None
    if rows:
        count = 1 if pairs is None else pairs.shape[1]
        targets = triton.next_power_of_2(count)
        row = triton.next_power_of_2(prototypes)
        whole = row <= WHOLE
        block = row if whole else max(16, BLOCK // targets)
        launch(
            _row_kernel,
            (rows,),
            student,
            teacher,
            center,
            None if pairs is None else pairs.contiguous(),
            weight,
            loss,
            difference,
            count,
            1 / student_temp,
            teacher_temp,
            lift,
            TEMP_ON_DEVICE=isinstance(teacher_temp, Tensor),
            PROTOTYPES=prototypes,
            TARGETS=targets,
            BLOCK=block,
            SWEEPS=1 if whole else 2,
            num_warps=min(16, max(4, block // 512)) if whole else 8,
        )
    return loss, difference


@jit
def _row_kernel(  # type: ignore[no-untyped-def]
    student,  # [R, K]
    teacher,  # [T, K]
    center,  # float32 [K]
    pairs,  # int64 [R, Q], or None: row r of the teacher for row r
    weight,  # [R]
    loss,  # float32 [R], out
    difference,  # [R, K] in the dtype of student, or None, out
    pair_count,  # Q
    student_sharpness,  # 1 / temperature
    teacher_temp,  # a number, or float64 []: a CUDA graph may change it
    lift,
    TEMP_ON_DEVICE: tl.constexpr,
    PROTOTYPES: tl.constexpr,  # K: few in a program's life, and Triton's interpreter wants it
    TARGETS: tl.constexpr,  # Q rounded up to a power of two
    BLOCK: tl.constexpr,  # a power of two; K at least for one sweep
    SWEEPS: tl.constexpr,  # 1 or 2
):
    """One student row against its teacher rows. In one sweep the rows stay in registers. In two
    the first finds the largest logit and the sum of exponentials, block by block (online
    softmax), and the second, which reads the rows from the cache, loss and gradient."""
    row = tl.program_id(0).to(tl.int64)
    if TEMP_ON_DEVICE:
        teacher_sharpness = 1.0 / tl.load(teacher_temp).to(tl.float32)
    else:
        teacher_sharpness = 1.0 / teacher_temp
    importance = tl.load(weight + row).to(tl.float32)
    q = tl.arange(0, TARGETS)
    if pairs is None:
        pair = row + tl.zeros([TARGETS], tl.int64)
    else:
        pair = tl.load(pairs + row * pair_count + q, mask=q < pair_count, other=-1)
    seen = pair >= 0
    count = tl.sum(seen.to(tl.float32), axis=0)
    student += row * PROTOTYPES
    if difference is not None:
        difference += row * PROTOTYPES
    targets = teacher + tl.where(seen, pair, 0)[:, None] * PROTOTYPES  # [TARGETS, 1]

    if SWEEPS == 1:
        k = tl.arange(0, BLOCK)
        inside = k < PROTOTYPES
        s = tl.load(student + k, mask=inside, other=0.0).to(tl.float32) * student_sharpness
        s = tl.where(inside, s, float("-inf"))
        s -= tl.max(s, axis=0)
        log_sum = tl.log(tl.sum(tl.exp(s), axis=0))
        c = tl.load(center + k, mask=inside, other=0.0)
        target = tl.zeros([BLOCK], tl.float32)
        for j in tl.static_range(TARGETS):
            if pairs is None:
                one = row
            else:
                one = tl.load(pairs + row * pair_count + j, mask=j < pair_count, other=-1)
            t = tl.load(teacher + one * PROTOTYPES + k, mask=inside & (one >= 0), other=0.0).to(
                tl.float32
            )
            t = tl.where(inside, (t - c) * teacher_sharpness, float("-inf"))
            t = tl.exp(t - tl.max(t, axis=0))
            target += t * tl.where(one >= 0, 1.0 / tl.sum(t, axis=0), 0.0)
        log_p = tl.where(inside, s - log_sum, 0.0)
        if difference is not None:
            out = (count * tl.exp(log_p) - target) * lift
            tl.store(difference + k, out.to(difference.dtype.element_ty), mask=inside)
        tl.store(loss + row, -importance * tl.sum(target * log_p, axis=0))
    else:
        s_max = float("-inf")
        s_sum = 0.0
        t_max = tl.full([TARGETS], float("-inf"), tl.float32)
        t_sum = tl.zeros([TARGETS], tl.float32)
        for start in range(0, PROTOTYPES, BLOCK):
            k = start + tl.arange(0, BLOCK)
            inside = k < PROTOTYPES
            s = tl.load(student + k, mask=inside, other=0.0).to(tl.float32) * student_sharpness
            s = tl.where(inside, s, float("-inf"))
            new_max = tl.maximum(s_max, tl.max(s, axis=0))
            s_sum = s_sum * tl.exp(s_max - new_max) + tl.sum(tl.exp(s - new_max), axis=0)
            s_max = new_max
            c = tl.load(center + k, mask=inside, other=0.0)
            t = tl.load(targets + k[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
            t = tl.where(inside[None, :], (t - c[None, :]) * teacher_sharpness, float("-inf"))
            new_t = tl.maximum(t_max, tl.max(t, axis=1))
            t_sum = t_sum * tl.exp(t_max - new_t) + tl.sum(tl.exp(t - new_t[:, None]), axis=1)
            t_max = new_t

        log_sum = tl.log(s_sum)
        share = tl.where(seen, 1.0 / t_sum, 0.0)
        total = 0.0
        for start in range(0, PROTOTYPES, BLOCK):
            k = start + tl.arange(0, BLOCK)
            inside = k < PROTOTYPES
            s = tl.load(student + k, mask=inside, other=0.0).to(tl.float32) * student_sharpness
            log_p = s - s_max - log_sum
            c = tl.load(center + k, mask=inside, other=0.0)
            t = tl.load(targets + k[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
            t = (t - c[None, :]) * teacher_sharpness - t_max[:, None]
            t = tl.where(inside[None, :], tl.exp(t) * share[:, None], 0.0)
            target = tl.sum(t, axis=0)
            total -= tl.sum(tl.where(inside, target * log_p, 0.0), axis=0)
            if difference is not None:
                out = (count * tl.exp(log_p) - target) * lift
                tl.store(difference + k, out.to(difference.dtype.element_ty), mask=inside)
        tl.store(loss + row, importance * total)


@jit
def _scale_rows_kernel(  # type: ignore[no-untyped-def]
    difference,  # [R, K]
    weight,  # [R]
    grad,  # float32 []
    gradient,  # [R, K], out
    scale,
    prototypes,  # K
    BLOCK: tl.constexpr,
):
    """A block of a row, times its weight, the gradient of the loss, and `scale`."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(grad) * tl.load(weight + row).to(tl.float32) * scale
    value = tl.load(difference + row * prototypes + k, mask=k < prototypes, other=0.0)
    value = (value.to(tl.float32) * factor).to(gradient.dtype.element_ty)
    tl.store(gradient + row * prototypes + k, value, mask=k < prototypes)
