"""One training step of the model as benchmarks take it, in its parts: ours, and the baseline, which
is `model.reference`: each crop size in its own pass, softmax of attention in memory, head on every
token, loss pair by pair, plain AdamW, one parameter after the other."""

import time
from typing import Any

import torch
from torch import Tensor

from ibeton.model import ModelConfig, build
from ibeton.model.ibot import IBOT
from ibeton.model.masking import masked_patches
from ibeton.model.network import Logits
from ibeton.model.optim import build_optimizer, clip_gradients, parameter_groups
from ibeton.model.reference import loss_reference, network_reference, update_teacher_reference
from ibeton.model.steps import Step, set_rates

PARTS = ("teacher", "student", "loss", "backward", "optimizer", "ema")
Times = dict[str, float]
LossOutput = tuple[dict[str, Tensor], Tensor]  # terms, batch means


def on_gpu(device: str) -> bool:
    """Whether "cuda", "cuda:1", "cpu" and so on is a GPU."""
    return torch.device(device).type == "cuda"


def now(device: str) -> float:
    """Seconds, once the device has done its work."""
    if on_gpu(device):
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Batch:
    """Random crops, and block-like masks: half of the views, a share of 0.1 to 0.5 of each."""

    def __init__(self, config: ModelConfig, images: int, local_size: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        views, size = config.global_crops_number, config.image_size
        grid = size // config.patch_size
        global_crops = torch.randn(views, images, 3, size, size, generator=generator)
        self.global_crops = global_crops.to(device)
        local_shape = (config.local_crops_number, images, 3, local_size, local_size)
        self.local_crops = torch.randn(local_shape, generator=generator).to(device)
        share = torch.linspace(0.1, 0.5, max(1, views * images // 2))
        share = torch.cat([share, torch.zeros(views * images - len(share))])
        share = share[torch.randperm(len(share), generator=generator)].view(views, images, 1, 1)
        self.masks = torch.rand(views, images, grid, grid, generator=generator) < share


def new_step(config: ModelConfig, device: str, dtype: torch.dtype | None) -> Step:
    """What takes steps of a new model of ours, in `dtype` (None: no autocast)."""
    torch.manual_seed(0)
    ibot = build(config).to(device)
    scaler = torch.amp.GradScaler(torch.device(device).type) if dtype is torch.float16 else None
    return Step(ibot, build_optimizer(ibot.student), scaler, autocast_dtype=dtype)


class Side:
    """One way to take a step; `step` gives the seconds of its parts."""

    def __init__(self, config: ModelConfig, device: str, dtype: torch.dtype | None) -> None:
        torch.manual_seed(0)
        self.ibot: IBOT = build(config).to(device)
        self.device, self.dtype = device, dtype
        self.kind = torch.device(device).type  # "cuda" of "cuda:1"
        self.scaler = torch.amp.GradScaler(self.kind, enabled=dtype is torch.float16)
        self.optimizer = self.make_optimizer()
        set_rates(self.optimizer, 1e-4, 0.04)

    def make_optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.ibot.student)

    def teacher(self, batch: Batch) -> Any:
        patches = masked_patches(batch.masks, batch.global_crops.device)
        return patches, self.ibot.teacher.targets(batch.global_crops, patches.places)

    def student(self, batch: Batch, teacher: Any) -> Logits:
        masks = batch.masks.to(batch.global_crops.device, non_blocking=True)
        return self.ibot.student(batch.global_crops, batch.local_crops, masks, teacher[0].places)

    def loss(self, batch: Batch, student: Logits, teacher: Any) -> LossOutput:
        return self.ibot.loss(student, teacher[1], teacher[0], 0)

    def clip(self) -> None:
        clip_gradients(self.ibot.student.parameters(), 3.0)

    def ema(self) -> None:
        self.ibot.update_teacher(0.996)

    def step(self, batch: Batch) -> Times:
        clock = Clock(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.kind, self.dtype, enabled=self.dtype is not None):
            with torch.no_grad():
                teacher = self.teacher(batch)
            clock.ends("teacher")
            student = self.student(batch, teacher)
            clock.ends("student")
            terms, means = self.loss(batch, student, teacher)
            clock.ends("loss")
        del student, teacher
        self.scaler.scale(terms["loss"]).backward()
        clock.ends("backward")
        self.ibot.loss.update_centers([means])
        self.scaler.unscale_(self.optimizer)
        self.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        clock.ends("optimizer")
        self.ema()
        clock.ends("ema")
        return clock.times


class Baseline(Side):
    """The step written the obvious way."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(self.ibot.student), foreach=False)

    def teacher(self, batch: Batch) -> Any:
        return network_reference(self.ibot.teacher, batch.global_crops)

    def student(self, batch: Batch, teacher: Any) -> Logits:
        masks = batch.masks.to(batch.global_crops.device)
        return network_reference(self.ibot.student, batch.global_crops, batch.local_crops, masks)

    def loss(self, batch: Batch, student: Logits, teacher: Any) -> LossOutput:
        masks = batch.masks.to(batch.global_crops.device)
        return loss_reference(self.ibot.loss, student, teacher[0], teacher[1], masks, 0)

    def clip(self) -> None:
        for parameter in self.ibot.student.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_((3.0 / (parameter.grad.norm() + 1e-6)).clamp(max=1))

    def ema(self) -> None:
        update_teacher_reference(self.ibot, 0.996)


class Clock:
    """Seconds of consecutive parts, the device's work included."""

    def __init__(self, device: str) -> None:
        self.device, self.times = device, Times()
        self.last, self.busy = now(device), time.process_time()

    def ends(self, part: str) -> None:
        end = now(self.device)
        self.times[part] = end - self.last
        self.times["busy"] = time.process_time() - self.busy  # so far, of all threads
        self.last = end
