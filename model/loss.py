"""Self-distillation of class tokens across views and of masked patches within a view.

In shapes: V global and L local views, B images, N patch tokens, K class and K2 patch prototypes.
All logits are view-major: every image of view 0, then every image of view 1, ...
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.schedules import temperature_schedule


def full(x: Tensor) -> Tensor:
    """The same in float32, or in float64 if that is what came in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class IBOTLoss(nn.Module):
    """iBOT, section 3.2, equations 1 to 3, with the centers and temperatures of the teacher.

    Centers are running means of the teacher's raw logits over all ranks, in the state dict as
    `center` [1, K] and `center2` [1, 1, K2]; they are updated after each step's loss is computed.
    Teacher temperatures go by epoch. Raises ValueError where their warm-up does not fit.
    """

    center: Tensor
    center2: Tensor

    def __init__(
        self,
        out_dim: int,
        patch_out_dim: int,
        global_views: int,
        local_views: int,
        epochs: int,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.07,
        warmup_teacher_patch_temp: float = 0.04,
        teacher_patch_temp: float = 0.07,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_momentum2: float = 0.9,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        pred_start_epoch: int = 0,
    ) -> None:
        super().__init__()
        if global_views < 1 or global_views + local_views < 2:
            raise ValueError(
                f"{global_views} global and {local_views} local views: expected a global view and"
                " another to compare it with"
            )
        self.global_views = global_views
        self.local_views = local_views
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.center_momentum2 = center_momentum2
        self.lambda1 = lambda1
        self.lambda2 = lambda2
        self.teacher_temps = temperature_schedule(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, epochs
        )
        self.teacher_patch_temps = temperature_schedule(
            warmup_teacher_patch_temp,
            teacher_patch_temp,
            warmup_teacher_temp_epochs,
            epochs,
            pred_start_epoch,
        )
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.register_buffer("center2", torch.zeros(1, 1, patch_out_dim))

    def forward(
        self,
        student_cls: Tensor,  # [V * B, K]
        student_patch: Tensor,  # [V * B, N, K2]
        student_local_cls: Tensor | None,  # [L * B, K], None without local views
        teacher_cls: Tensor,  # [V * B, K]
        teacher_patch: Tensor,  # [V * B, N, K2]
        masks: Tensor,  # bool, V * B * N values in view-major order
        epoch: int,
    ) -> dict[str, Tensor]:
        """Scalars: `loss` = `cls` + `patch`, both weighted by lambda; without gradient
        `teacher_entropy` (nats, of the class targets) and `acc` (share of images whose first
        teacher view and second student view agree on the likeliest prototype).

        Computes in float32 at least, whatever the dtype of the logits; moves the centers. Raises
        ValueError for shapes that do not fit together or an epoch beyond the schedule.
        """
        self._check(student_cls, student_patch, student_local_cls, teacher_patch, masks, epoch)
        views = list(student_cls.chunk(self.global_views))
        if student_local_cls is not None:
            views += student_local_cls.chunk(self.local_views)
        log_p = [(full(view) / self.student_temp).log_softmax(dim=-1) for view in views]
        temp = float(self.teacher_temps[epoch])
        targets = ((full(teacher_cls.detach()) - self.center) / temp).softmax(dim=-1)
        cls = self.lambda1 * self._across_views(log_p, targets)
        patch_temp = float(self.teacher_patch_temps[epoch])
        patch = self.lambda2 * self._masked_patches(student_patch, teacher_patch, masks, patch_temp)
        self._update_centers(teacher_cls, teacher_patch)
        with torch.no_grad():
            first = teacher_cls.chunk(self.global_views)[0]
            agree = first.argmax(dim=-1) == log_p[1].argmax(dim=-1)
            entropy = -torch.special.xlogy(targets, targets).sum(dim=-1).mean()
        return {
            "loss": cls + patch,
            "cls": cls,
            "patch": patch,
            "teacher_entropy": entropy,
            "acc": agree.float().mean(),
        }

    def _across_views(self, log_p: list[Tensor], targets: Tensor) -> Tensor:
        """Mean cross-entropy over images and over pairs of a teacher view and another student view.
        log_p: V + L of [B, K]; targets [V * B, K]."""
        terms = [
            -(target * log_p[v]).sum(dim=-1).mean()
            for q, target in enumerate(targets.chunk(self.global_views))
            for v in range(len(log_p))
            if v != q
        ]
        return torch.stack(terms).mean()

    def _masked_patches(
        self, student_patch: Tensor, teacher_patch: Tensor, masks: Tensor, temp: float
    ) -> Tensor:
        """Cross-entropy of each masked patch with the teacher's of the same view: mean over an
        image's masked patches (0 if it has none), then over images, then over views."""
        terms = []
        masks = masks.reshape(student_patch.shape[:2]).to(torch.float32)  # [V * B, N]
        views = (t.chunk(self.global_views) for t in (student_patch, teacher_patch, masks))
        for student, teacher, mask in zip(*views, strict=True):
            target = ((full(teacher.detach()) - self.center2) / temp).softmax(dim=-1)
            log_p = (full(student) / self.student_temp).log_softmax(dim=-1)
            by_patch = -(target * log_p).sum(dim=-1)  # [B, N]
            by_image = (by_patch * mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)
            terms.append(by_image.mean())
        return torch.stack(terms).mean()

    @torch.no_grad()
    def _update_centers(self, teacher_cls: Tensor, teacher_patch: Tensor) -> None:
        """Move the centers towards this step's mean, over all patches, masked or not, and over all
        ranks, which hold equally many images."""
        cls_mean = full(teacher_cls).mean(dim=0)  # [K]
        patch_mean = full(teacher_patch).mean(dim=(0, 1))  # [K2]
        if dist.is_available() and dist.is_initialized():
            both = torch.cat([cls_mean, patch_mean])
            dist.all_reduce(both)
            both /= dist.get_world_size()
            cls_mean, patch_mean = both.split([len(cls_mean), len(patch_mean)])
        self.center.lerp_(cls_mean.view_as(self.center), 1 - self.center_momentum)
        self.center2.lerp_(patch_mean.view_as(self.center2), 1 - self.center_momentum2)

    def _check(
        self,
        student_cls: Tensor,
        student_patch: Tensor,
        student_local_cls: Tensor | None,
        teacher_patch: Tensor,
        masks: Tensor,
        epoch: int,
    ) -> None:
        if not 0 <= epoch < len(self.teacher_temps):
            raise ValueError(
                f"epoch {epoch} is outside the schedule of --epochs {len(self.teacher_temps)}"
            )
        if len(student_cls) % self.global_views:
            raise ValueError(
                f"{len(student_cls)} class logits are not {self.global_views} views of one batch"
            )
        batch = len(student_cls) // self.global_views
        local_rows = 0 if student_local_cls is None else len(student_local_cls)
        if local_rows != self.local_views * batch:
            raise ValueError(
                f"{local_rows} local class logits for {batch} images: expected"
                f" --local-crops-number {self.local_views} an image"
            )
        if student_patch.shape != teacher_patch.shape:
            raise ValueError(
                f"patch logits of student {list(student_patch.shape)} and teacher"
                f" {list(teacher_patch.shape)}: expected the same shape"
            )
        if masks.numel() != student_patch.shape[0] * student_patch.shape[1]:
            raise ValueError(
                f"masks {list(masks.shape)} for patch logits {list(student_patch.shape)}:"
                " expected one value a patch of the global views"
            )
