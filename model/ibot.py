"""Student, teacher and loss: a batch in, a loss out, and the teacher's moving average."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from ibeton.model.backbones.vit import VisionTransformer
from ibeton.model.config import SWINS, ModelConfig
from ibeton.model.head import IBOTHead
from ibeton.model.kernels.half_weights import HalfWeights
from ibeton.model.loss import IBOTLoss
from ibeton.model.masking import MaskedPatches, masked_patches
from ibeton.model.network import Logits, Network
from ibeton.model.optim import fused_sgd
from ibeton.stages import rest_is, stage

if TYPE_CHECKING:
    from ibeton.model.backbones.swin import SwinTransformer


class IBOT(nn.Module):
    """The student learns from the teacher, which is the student's exponential moving average.

    `student_call` is what runs the student: itself, or its DDP wrapper after `wrap_ddp`. It is not
    a registered submodule, so state dicts keep `student.*`, `teacher.*`, `loss.*`.
    """

    student_call: Callable[..., Logits]

    def __init__(
        self, student: Network, teacher: Network, loss: IBOTLoss, micro_steps: int = 1
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.loss = loss
        self.micro_steps = micro_steps
        self.__dict__["student_call"] = student
        self.half_weights = HalfWeights([student, teacher])
        self.teacher.requires_grad_(False)
        self.copy_student_to_teacher()

    def copy_student_to_teacher(self) -> None:
        """Start the teacher from the student. A shared teacher of an unshared student takes first
        `last_layer`, then `last_layer2` into its one tensor, as published: the latter stays."""
        state = self.student.state_dict()
        state.pop("backbone.masked_embed", None)
        self.teacher.load_state_dict(state)

    def wrap_ddp(self, device: torch.device) -> None:
        """Average the student's gradients over ranks from now on. Networks must be on `device`, and
        the process group initialized. Batch norms in the head take statistics over all ranks.

        Gradients travel in buckets during the backward, and lie in those buckets. All
        parameters take part in every step, so DDP need not look for unused ones, and the graph
        is static unless micro-steps leave some backwards unreduced.
        Raises ValueError for batch norms on a CPU, where PyTorch cannot synchronize them."""
        if self.student.head.couples_tokens():
            if device.type != "cuda":
                raise ValueError(
                    "--norm-in-head bn with several processes needs CUDA devices: use ln or none"
                )
            self.student.head.sync_batch_norm()
            self.teacher.head.sync_batch_norm()
        device_ids = [device] if device.type == "cuda" else None
        student_call = DistributedDataParallel(
            self.student,
            device_ids,
            broadcast_buffers=False,  # constants, or batch statistics that all ranks share
            gradient_as_bucket_view=True,
            static_graph=self.micro_steps == 1,
        )
        student_call.register_comm_hook(None, _all_reduce)
        self.__dict__["student_call"] = student_call

    def forward(
        self,
        global_crops: Tensor,  # [V, B, 3, S, S]
        local_crops: Tensor | None,  # [L, B, 3, s, s]
        masks: Tensor,  # bool [V, B, h, w], True = masked for the student; best on the CPU
        epoch: int,
        patches: MaskedPatches | None = None,
        temps: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Terms of the loss and batch means [K + K2], see `IBOTLoss.forward`. The teacher sees
        global views, unmasked.

        The host does not wait for the device if `masks` are on the CPU, or if `patches`, those of
        `masks`, are given. `temps`: see `IBOTLoss.forward`. The caller gives the means to
        `loss.update_centers`, once per step.
        """
        if patches is None:
            patches = masked_patches(masks, global_crops.device)
        masks = masks.to(global_crops.device, non_blocking=True)
        with self.half_weights.fresh(global_crops):
            with stage("teacher"), torch.no_grad():
                teacher = self.teacher.targets(global_crops, patches.places)
            with stage("student"):
                student = self.student_call(global_crops, local_crops, masks, patches.places)
        with stage("loss"):
            return self.loss(student, teacher, patches, epoch, temps)

    @torch.no_grad()
    def update_teacher(self, momentum: float | Tensor, skipped: Tensor | None = None) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, after the optimizer's step, for
        the parameters that both have by name; buffers stay (published code). `momentum` may be a
        float64 scalar on the device. If `skipped`, a bool on the device, is true, nothing
        changes."""
        rate = 1 - momentum
        student = dict(self.student.named_parameters())
        teacher = {name: p for name, p in self.teacher.named_parameters() if name in student}
        matching: list[Tensor] = [student[name] for name in teacher]
        # A step of SGD with gradient teacher - student: the one update of lists that can be skipped
        # on the device. Its results are those of `torch.lerp`.
        fused_sgd(
            list(teacher.values()),
            matching,
            rate.float() if isinstance(rate, Tensor) else rate,
            None if skipped is None else skipped.float(),
            decay=1.0,
            maximize=True,
        )


def _all_reduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's own mean of gradients. With the last bucket nothing is left of the backward to compute:
    what remains of it is the wait for other ranks."""
    if bucket.is_last():
        rest_is("comm")
    return allreduce_hook(None, bucket)  # type: ignore[arg-type]


def build_backbone(config: ModelConfig, is_student: bool) -> "VisionTransformer | SwinTransformer":
    """The student's backbone, with mask token and stochastic depth, or the teacher's, with neither.
    `model.network` says what a backbone must offer."""
    if config.arch in SWINS:
        # Imported here, as timm takes seconds to import.
        from ibeton.model.backbones.swin import SwinTransformer

        return SwinTransformer(config, is_student)
    return VisionTransformer(config, is_student)


def build_network(config: ModelConfig, is_student: bool) -> Network:
    """The student or the teacher, freshly initialized."""
    return Network(build_backbone(config, is_student), IBOTHead(config, is_student))


def build(config: ModelConfig) -> IBOT:
    """The whole model on the CPU (or torch's default device), freshly initialized from torch's
    random state. Raises ValueError, naming the option, for settings that cannot work."""
    config.check()
    loss = IBOTLoss(config)
    student, teacher = build_network(config, True), build_network(config, False)
    return IBOT(student, teacher, loss, config.micro_steps)
