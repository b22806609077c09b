"""Self-distillation of class tokens across views and of masked patches within a view.

In shapes: V global and L local views, B images, N patch tokens, M masked patches, K class and K2
patch prototypes. All logits are view-major: every image of view 0, then every image of view 1, ...
`model.reference` has the same loss as the paper writes it.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ibeton.model.config import ModelConfig
from ibeton.model.kernels.cross_entropy import cross_entropy, upcast
from ibeton.model.masking import MaskedPatches
from ibeton.model.network import Logits, Targets
from ibeton.model.schedules import temperature_schedule


class IBOTLoss(nn.Module):
    """iBOT, section 3.2, equations 1 to 3, with the centers and temperatures of the teacher.

    Centers are running means of the teacher's raw logits over all ranks, in the state dict as
    `center` [1, K] and `center2` [1, 1, K2]. Each forward also returns the means of its batch, for
    `update_centers` to move the centers once per step, however many batches the step consists of.
    Teacher temperatures follow a schedule over epochs. Raises ValueError if its warm-up is too
    long.
    """

    center: Tensor
    center2: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.global_views = config.global_crops_number
        self.local_views = config.local_crops_number
        self.student_temp = config.student_temp
        self.center_momentum = config.center_momentum
        self.center_momentum2 = config.center_momentum2
        self.lambda1 = config.lambda1
        self.lambda2 = config.lambda2
        self.teacher_temps = temperature_schedule(
            config.warmup_teacher_temp,
            config.teacher_temp,
            config.warmup_teacher_temp_epochs,
            config.epochs,
        )
        self.teacher_patch_temps = temperature_schedule(
            config.warmup_teacher_patch_temp,
            config.teacher_patch_temp,
            config.warmup_teacher_temp_epochs,
            config.epochs,
            config.pred_start_epoch,
        )
        self.register_buffer("center", torch.zeros(1, config.out_dim))
        self.register_buffer("center2", torch.zeros(1, 1, config.patch_prototypes()))

    def forward(
        self,
        student: Logits,
        teacher: Targets,
        patches: MaskedPatches,
        epoch: int,
        temps: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Class logits of student and teacher, and their logits [M, K2] of the masked `patches`
        -> terms of the loss, and the batch means that `update_centers` takes.

        The terms are scalars: `loss` = `cls` + `patch`, both weighted by lambda; without gradient
        `teacher_entropy` (nats, of the class targets) and `acc` (share of images whose first
        teacher view and second student view agree on the likeliest prototype). The means [K + K2]
        are those of the teacher's class and patch logits, float32 at least.

        `temps` [2] replaces the teacher temperatures of `epoch`, for class and patches. Computes in
        float32 at least, whatever the dtype of the logits. Raises ValueError for shapes that do not
        match or an epoch beyond the schedule.
        """
        self._check(student, teacher, patches)
        cls_logits, patch_logits, local_cls = student
        if local_cls is not None:
            cls_logits = _together(cls_logits, local_cls)
        temp, patch_temp = self.temperatures(epoch) if temps is None else temps.unbind()
        cls = self.lambda1 * self._across_views(cls_logits, teacher.cls, temp)
        patch = self.lambda2 * cross_entropy(
            patch_logits,
            teacher.patch,
            self.center2.flatten(),
            torch.arange(len(patch_logits), device=patch_logits.device).unsqueeze(1),
            patches.weight,
            self.student_temp,
            patch_temp,
        )
        with torch.no_grad():
            targets = ((upcast(teacher.cls) - self.center) / temp).softmax(dim=-1)
            entropy = -torch.special.xlogy(targets, targets).sum(dim=-1).mean()
            batch = len(teacher.cls) // self.global_views
            second = cls_logits[batch : 2 * batch]
            agree = teacher.cls[:batch].argmax(dim=-1) == second.argmax(dim=-1)
            batch_means = torch.cat([upcast(teacher.cls).mean(dim=0), teacher.patch_mean])
        terms = {
            "loss": cls + patch,
            "cls": cls,
            "patch": patch,
            "teacher_entropy": entropy,
            "acc": agree.float().mean(),
        }
        return terms, batch_means

    def temperatures(self, epoch: int) -> tuple[float, float]:
        """Of the teacher's class token and patches. Raises ValueError for an epoch beyond the
        schedule."""
        if not 0 <= epoch < len(self.teacher_temps):
            raise ValueError(
                f"epoch {epoch} is outside the schedule of --epochs {len(self.teacher_temps)}"
            )
        return float(self.teacher_temps[epoch]), float(self.teacher_patch_temps[epoch])

    def _across_views(self, student: Tensor, teacher: Tensor, temp: float | Tensor) -> Tensor:
        """Mean cross-entropy over images and over pairs of a teacher view and another student view.
        student [(V + L) * B, K], teacher [V * B, K]."""
        views, batch = self.global_views + self.local_views, len(teacher) // self.global_views
        student_view = torch.arange(views, device=student.device)[:, None, None]
        teacher_view = torch.arange(self.global_views, device=student.device)
        rows = teacher_view * batch + torch.arange(batch, device=student.device)[:, None]  # [B, V]
        pairs = rows.expand(views, -1, -1).masked_fill(student_view == teacher_view, -1)
        weight = torch.full(
            (len(student),),
            1 / (batch * self.global_views * (views - 1)),
            dtype=torch.float64,
            device=student.device,
        )
        center = self.center.flatten()
        return cross_entropy(
            student, teacher, center, pairs.flatten(0, 1), weight, self.student_temp, temp
        )

    @torch.no_grad()
    def update_centers(self, batch_means: list[Tensor], reduced: bool = False) -> None:
        """Move the centers towards the mean of the `batch_means`, each [K + K2], and over all
        ranks, which hold equally many images each. Call once per step, after its backward.
        `reduced`: they are the same on all ranks already."""
        mean = torch.stack(batch_means).mean(dim=0)
        if not reduced and dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        cls_mean, patch_mean = mean.split([self.center.shape[-1], self.center2.shape[-1]])
        self.center.lerp_(cls_mean.view_as(self.center), 1 - self.center_momentum)
        self.center2.lerp_(patch_mean.view_as(self.center2), 1 - self.center_momentum2)

    def _check(self, student: Logits, teacher: Targets, patches: MaskedPatches) -> None:
        cls, patch, local_cls = student
        if len(cls) % self.global_views:
            raise ValueError(
                f"{len(cls)} class logits are not {self.global_views} views of one batch"
            )
        batch = len(cls) // self.global_views
        local_rows = 0 if local_cls is None else len(local_cls)
        if local_rows != self.local_views * batch:
            raise ValueError(
                f"{local_rows} local class logits for {batch} images: expected"
                f" --local-crops-number {self.local_views} an image"
            )
        if cls.shape != teacher.cls.shape or patch.shape != teacher.patch.shape:
            raise ValueError(
                f"logits of student {list(cls.shape)}, {list(patch.shape)} and teacher"
                f" {list(teacher.cls.shape)}, {list(teacher.patch.shape)}: expected the same shapes"
            )
        if len(patches.weight) != len(patch):
            raise ValueError(
                f"{len(patches.weight)} masked patches for patch logits {list(patch.shape)}:"
                " expected one weight a row"
            )


def _together(cls: Tensor, local_cls: Tensor) -> Tensor:
    """Both below each other: without a copy if they are the two parts of one tensor."""
    whole = cls._base
    both = (len(cls) + len(local_cls), *cls.shape[1:])
    if whole is not None and whole is local_cls._base and whole.shape == both:
        return whole
    return torch.cat([cls, local_cls])
