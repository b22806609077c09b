"""Self-distillation of class tokens across views and of masked patches within a view.

In shapes: V global and L local views, B images, N patch tokens, M masked patches, K class and K2
patch prototypes. All logits are view-major: every image of view 0, then every image of view 1, ...
`model.reference` has the same loss as the paper writes it.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ibeton.distributed import rank_and_size
from ibeton.model.config import ModelConfig
from ibeton.model.kernels.head.class_metrics import class_metrics
from ibeton.model.kernels.head.cross_entropy import cross_entropy
from ibeton.model.masking import MaskedPatches
from ibeton.model.network import Logits, Targets
from ibeton.model.schedules import temperature_schedule
from ibeton.stages import stage


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
        self._pairs: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
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
        `teacher_entropy` (nats, of the class targets), `prototypes` (how many the class targets of
        the batch use: exp of the entropy of their mean) and `acc` (share of images whose first
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
        center, center2 = self.center.flatten(), self.center2.flatten()
        pairs, weight = self._across_views(len(teacher.cls), cls_logits.device)
        cls = cross_entropy(cls_logits, teacher.cls, center, pairs, weight, self.student_temp, temp)
        patch = cross_entropy(
            *(patch_logits, teacher.patch, center2, None, patches.weight),
            *(self.student_temp, patch_temp),
        )
        cls = cls if self.lambda1 == 1 else self.lambda1 * cls
        patch = patch if self.lambda2 == 1 else self.lambda2 * patch
        with torch.no_grad():
            entropy, agree = class_metrics(teacher.cls, cls_logits, center, temp, self.global_views)
            wide = torch.promote_types(teacher.cls.dtype, torch.float32)
            mean = ((teacher.cls.to(wide) - center) / temp).softmax(dim=-1).mean(dim=0)
            batch_means = torch.cat([teacher.cls.mean(dim=0, dtype=wide), teacher.patch_mean])
        terms = {
            "loss": cls + patch,
            "cls": cls,
            "patch": patch,
            "teacher_entropy": entropy,
            "prototypes": (-torch.special.xlogy(mean, mean).sum()).exp(),
            "acc": agree,
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

    def _across_views(self, teacher_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """For each row of the student's class logits of all views, the teacher's rows of the other
        views, int64 [(V + L) * B, V], -1 for its own; and the weights that make the mean over
        images and pairs of views. Kept, as they only depend on the batch size."""
        key = (teacher_rows, device)
        if key not in self._pairs:
            views, batch = self.global_views + self.local_views, teacher_rows // self.global_views
            student_view = torch.arange(views)[:, None, None]
            teacher_view = torch.arange(self.global_views)
            rows = teacher_view * batch + torch.arange(batch)[:, None]  # [B, V]
            pairs = rows.expand(views, -1, -1).masked_fill(student_view == teacher_view, -1)
            share = 1 / (max(1, batch) * self.global_views * (views - 1))
            weight = torch.full((views * batch,), share, dtype=torch.float64)
            self._pairs[key] = pairs.flatten(0, 1).to(device), weight.to(device)
        return self._pairs[key]

    @torch.no_grad()
    def update_centers(
        self, batch_means: list[Tensor], reduced: bool = False, skipped: Tensor | None = None
    ) -> None:
        """Move the centers towards the mean of the `batch_means`, each [K + K2], and over all
        ranks, which hold equally many images each. Call once per step, after its backward.
        `reduced`: they are the same on all ranks already. If `skipped`, a bool on the device, is
        true, nothing changes."""
        mean = batch_means[0] if len(batch_means) == 1 else torch.stack(batch_means).mean(dim=0)
        processes = rank_and_size()[1]
        if not reduced and processes > 1:
            with stage("comm"):
                mean = mean.clone()
                dist.all_reduce(mean)
                mean /= processes
        cls_mean, patch_mean = mean.split([self.center.shape[-1], self.center2.shape[-1]])
        for center, new, momentum in (
            (self.center, cls_mean, self.center_momentum),
            (self.center2, patch_mean, self.center_momentum2),
        ):
            if skipped is None:
                center.lerp_(new.view_as(center), 1 - momentum)
            else:
                moved = center.lerp(new.view_as(center), 1 - momentum)
                torch.where(skipped, center, moved, out=center)

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
                f" --local-crops-number {self.local_views} per image"
            )
        if cls.shape != teacher.cls.shape or patch.shape != teacher.patch.shape:
            raise ValueError(
                f"logits of student {list(cls.shape)}, {list(patch.shape)} and teacher"
                f" {list(teacher.cls.shape)}, {list(teacher.patch.shape)}: expected the same shapes"
            )
        if len(patches.weight) != len(patch):
            raise ValueError(
                f"{len(patches.weight)} masked patches for patch logits {list(patch.shape)}:"
                " expected one weight per row"
            )


def _together(cls: Tensor, local_cls: Tensor) -> Tensor:
    """Both concatenated: without a copy if they are the two parts of one tensor."""
    whole = cls._base
    both = (len(cls) + len(local_cls), *cls.shape[1:])
    if whole is not None and whole is local_cls._base and whole.shape == both:
        return whole
    return torch.cat([cls, local_cls])
