"""A plain implementation of the step: each crop size in its own pass, attention with its softmax in
memory, the head on every token, the loss for each pair of views. It runs on the same modules and
weights. Tests compare the fast paths with it, and benchmarks/model.py uses it as the baseline.

In shapes: V global and L local views, B images, N patch tokens, C channels, K prototypes.
"""

from typing import cast

import torch
from torch import Tensor
from torchvision.ops import stochastic_depth

from ibeton.model.backbones.blocks import Block
from ibeton.model.backbones.vit import VisionTransformer
from ibeton.model.ibot import IBOT
from ibeton.model.kernels.head.cross_entropy import upcast
from ibeton.model.kernels.packed_attention import attention_reference
from ibeton.model.loss import IBOTLoss
from ibeton.model.network import Logits, Network


def block_reference(block: Block, x: Tensor, drop_rate: float = 0.0) -> Tensor:
    """x [B, T, C] -> [B, T, C]."""
    images, tokens, _ = x.shape
    qkv = block.attn.qkv(block.norm1(x)).flatten(0, 1)
    out = attention_reference(qkv, images, tokens, block.attn.num_heads)
    out = block.attn.proj(out).unflatten(0, (images, tokens))
    out = out if block.gamma_1 is None else block.gamma_1 * out
    x = x + stochastic_depth(out, drop_rate, "row", block.training)
    out = block.mlp(block.norm2(x))
    out = out if block.gamma_2 is None else block.gamma_2 * out
    return x + stochastic_depth(out, drop_rate, "row", block.training)


def vit_reference(vit: VisionTransformer, x: Tensor, masks: Tensor | None = None) -> Tensor:
    """Images [B, 3, H, W], masks bool [B, h, w] -> tokens [B, 1 + N, C]."""
    position = vit.position_embedding(x.shape[2], x.shape[3])
    patches = vit.patch_embed.proj(x)  # [B, C, h, w]
    if masks is not None:
        assert vit.masked_embed is not None
        masked_embed = vit.masked_embed.to(patches.dtype)[:, :, None, None]
        patches = torch.where(masks.unsqueeze(1), masked_embed, patches)
    cls_token = vit.cls_token.expand(len(x), -1, -1)
    x = torch.cat([cls_token, patches.flatten(2).transpose(1, 2)], dim=1) + position
    for block, rate in zip(vit.blocks, vit.drop_path_rates, strict=True):
        x = block_reference(cast(Block, block), x, rate)
    x = vit.norm(x)
    if vit.fc_norm is None:
        return x
    return torch.cat([vit.fc_norm(x[:, 1:].mean(dim=1, keepdim=True)), x[:, 1:]], dim=1)


def network_reference(
    network: Network,
    global_crops: Tensor,
    local_crops: Tensor | None = None,
    masks: Tensor | None = None,
) -> Logits:
    """As `Network.forward` for all patches: the head on every token of every view."""
    flat_masks = None if masks is None else masks.flatten(0, 1)
    backbone = cast(VisionTransformer, network.backbone)
    cls, patch = network.head(vit_reference(backbone, global_crops.flatten(0, 1), flat_masks))
    if local_crops is None or len(local_crops) == 0:
        return cls, patch, None
    local_cls, _ = network.head(vit_reference(backbone, local_crops.flatten(0, 1)))
    return cls, patch, local_cls


def across_views_reference(
    loss: IBOTLoss, student: list[Tensor], teacher: Tensor, temp: float
) -> Tensor:
    """Mean cross-entropy over images and over pairs of a teacher view and another student view
    (iBOT, section 3.2, equation 1). student: V + L of [B, K]; teacher [V * B, K]."""
    targets = ((upcast(teacher) - loss.center) / temp).softmax(dim=-1)
    log_p = [(upcast(view) / loss.student_temp).log_softmax(dim=-1) for view in student]
    terms = [
        -(target * log_p[v]).sum(dim=-1).mean()
        for q, target in enumerate(targets.chunk(loss.global_views))
        for v in range(len(log_p))
        if v != q
    ]
    return torch.stack(terms).mean()


def masked_patches_reference(
    loss: IBOTLoss, student: Tensor, teacher: Tensor, masks: Tensor, temp: float
) -> Tensor:
    """Cross-entropy of each masked patch with the teacher's of the same view: mean over an image's
    masked patches (0 if it has none), then over images, then over views (iBOT, section 3.1,
    equation 2). student, teacher [V * B, N, K2]; masks bool of V * B * N values."""
    terms = []
    masks = masks.reshape(student.shape[:2]).to(torch.float32)  # [V * B, N]
    views = (t.chunk(loss.global_views) for t in (student, teacher, masks))
    for student_view, teacher_view, mask in zip(*views, strict=True):
        target = ((upcast(teacher_view) - loss.center2) / temp).softmax(dim=-1)
        log_p = (upcast(student_view) / loss.student_temp).log_softmax(dim=-1)
        by_patch = -(target * log_p).sum(dim=-1)  # [B, N]
        by_image = (by_patch * mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)
        terms.append(by_image.mean())
    return torch.stack(terms).mean()


def loss_reference(
    loss: IBOTLoss,
    student: Logits,  # [V * B, K], [V * B, N, K2], [L * B, K] or None
    teacher_cls: Tensor,  # [V * B, K]
    teacher_patch: Tensor,  # [V * B, N, K2]
    masks: Tensor,  # bool, V * B * N values, view-major
    epoch: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """`IBOTLoss.forward` from the logits of all patches."""
    cls_logits, patch_logits, local_cls = student
    teacher_cls, teacher_patch = teacher_cls.detach(), teacher_patch.detach()
    views = list(cls_logits.chunk(loss.global_views))
    if local_cls is not None:
        views += local_cls.chunk(loss.local_views)
    temp, patch_temp = float(loss.teacher_temps[epoch]), float(loss.teacher_patch_temps[epoch])
    cls = loss.lambda1 * across_views_reference(loss, views, teacher_cls, temp)
    patch = loss.lambda2 * masked_patches_reference(
        loss, patch_logits, teacher_patch, masks, patch_temp
    )
    first = teacher_cls.chunk(loss.global_views)[0]
    targets = ((upcast(teacher_cls) - loss.center) / temp).softmax(dim=-1)
    mean = targets.mean(dim=0)
    means = [upcast(teacher_cls).mean(dim=0), upcast(teacher_patch).mean(dim=(0, 1))]
    terms = {
        "loss": cls + patch,
        "cls": cls,
        "patch": patch,
        "teacher_entropy": -torch.special.xlogy(targets, targets).sum(dim=-1).mean(),
        "prototypes": (-torch.special.xlogy(mean, mean).sum()).exp(),
        "acc": (first.argmax(dim=-1) == views[1].argmax(dim=-1)).float().mean(),
    }
    return terms, torch.cat(means)


def forward_reference(
    ibot: IBOT,
    global_crops: Tensor,
    local_crops: Tensor | None,
    masks: Tensor,
    epoch: int,
    *derived: object,
) -> tuple[dict[str, Tensor], Tensor]:
    """`IBOT.forward` on one rank. What is `derived` from masks and epoch, it derives itself."""
    with torch.no_grad():
        teacher_cls, teacher_patch, _ = network_reference(ibot.teacher, global_crops)
    student = network_reference(ibot.student, global_crops, local_crops, masks)
    return loss_reference(ibot.loss, student, teacher_cls, teacher_patch, masks, epoch)


@torch.no_grad()
def update_teacher_reference(ibot: IBOT, momentum: float) -> None:
    """As `IBOT.update_teacher`, one parameter after the other."""
    student = dict(ibot.student.named_parameters())
    for name, parameter in ibot.teacher.named_parameters():
        if name in student:
            parameter.mul_(momentum).add_(student[name], alpha=1 - momentum)
