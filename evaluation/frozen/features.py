"""Photos -> features of a frozen backbone: where every frozen evaluation starts.

One forward pass gives all of these, as far as they are requested by name:

    cls         class token of the last block, [C]
    blocks      class tokens of the last four blocks, concatenated, [4 C] (Swin: the width
                of each block's stage)
    patch_mean  mean of the last block's patch tokens, [C]
    gem         generalized mean (power 4) of the last block's patch tokens, [C]
    patches     patch tokens of the last block, [N, C]
    parts       means of the 1, 7, 14, 56, 112 and 196 patch tokens that the class token attends to
                most in the last block, and of all, [7, C], before the final norm; ViT only
    prototype   number of the prototype that the head gives the class token, int64 []

All other tokens are those after the final norm, as published. Swin has no class token: the mean of
its tokens stands in for it (published code).
"""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ibeton.evaluation.photos import PhotoSet, PhotoViews, ViewBatch, view_batches
from ibeton.evaluation.trainable import precision_on
from ibeton.model.head import IBOTHead

log = logging.getLogger(__name__)

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of pixels on the 0..1 scale
STD = (0.229, 0.224, 0.225)
NAMES = ("cls", "blocks", "patch_mean", "gem", "patches", "parts", "prototype")
BLOCKS = 4
GEM_POWER = 4.0
GEM_LEAST = 1e-6  # what tokens are raised to before the power
PARTS = (1, 7, 14, 56, 112, 196)  # published k; 196 is all patches at 224 pixels


@dataclass(frozen=True)
class Extraction:
    """How features are computed. `precision` auto is fp16 on a GPU, fp32 on a CPU; `threads` 0 is
    one per core."""

    device: torch.device | str = "cpu"
    batch_size: int = 128
    threads: int = 0
    precision: str = "fp32"

    def dtype(self) -> torch.dtype | None:
        """What autocast computes in; None for plain float32. Raises as `precision_on`."""
        return precision_on(self.device, self.precision)[1]

    def autocast(self) -> torch.autocast:
        dtype = self.dtype()
        return torch.autocast(torch.device(self.device).type, dtype, enabled=dtype is not None)


@dataclass
class Features:
    """Features of the photos of a set that could be read, in the set's order."""

    arrays: dict[str, np.ndarray]  # by name, [n, ...], float32 (prototype: int64)
    labels: Tensor  # int64 [n]

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def __len__(self) -> int:
        return len(self.labels)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode; restores each module's mode afterwards."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def tokens_of(
    backbone: nn.Module, head: IBOTHead | None, images: Tensor, names: Sequence[str]
) -> dict[str, Tensor]:
    """Features by name of normalized images [B, 3, S, S]: tensors [B, ...] as the module says.

    A backbone that only maps images to tokens [B, 1 + N, C] has all but `blocks` and `parts`.
    Raises ValueError for parts of a Swin, and for prototypes without a head or without a number.
    """
    looking: AbstractContextManager[list[Tensor]] = nullcontext([])
    if "parts" in names:
        looking = _last_block(backbone)
    with looking as seen:
        outputs = [backbone(images)] if "blocks" not in names else _blocks(backbone, images)
    tokens = outputs[-1]  # [B, 1 + N, C]
    cls, patches = tokens[:, 0], tokens[:, 1:]
    found: dict[str, Tensor] = {}
    for name in names:
        if name == "cls":
            found[name] = cls
        elif name == "blocks":
            found[name] = torch.cat([output[:, 0] for output in outputs], dim=1)
        elif name == "patch_mean":
            found[name] = patches.mean(dim=1)
        elif name == "gem":
            raised = patches.float().clamp(min=GEM_LEAST).pow(GEM_POWER)
            found[name] = raised.mean(dim=1).pow(1 / GEM_POWER)
        elif name == "patches":
            found[name] = patches
        elif name == "parts":
            attention, packed = seen
            found[name] = most_attended(packed.view_as(tokens)[:, 1:], attention)
        elif name == "prototype" and head is not None:
            logits = head.cls_logits(cls)
            check_finite(logits)  # the numbers of prototypes would not tell
            found[name] = logits.argmax(dim=1)
        else:
            raise ValueError(
                f"unknown feature {name}: expected one of {', '.join(NAMES)}; prototype needs a"
                " network with its head"
            )
    return found


def _blocks(backbone: Any, images: Tensor) -> list[Tensor]:
    """Tokens of the last blocks; with mean pooling, the normed mean of patches in front."""
    outputs = backbone.get_intermediate_layers(images, BLOCKS)
    norm = getattr(backbone, "fc_norm", None)
    if norm is None:
        return outputs
    return [torch.cat([norm(o[:, 1:].mean(1, keepdim=True)), o[:, 1:]], dim=1) for o in outputs]


@contextmanager
def _last_block(backbone: Any) -> Iterator[list[Tensor]]:
    """During a forward pass of one size of images, of the last block: the attention of its class
    token to the patches, mean of the heads, [B, N]; and its tokens before the final norm, [B * (1 +
    N), C]."""
    if not hasattr(backbone, "blocks"):
        raise ValueError("part-wise probing needs a class token that attends: a ViT, not a Swin")
    found: list[Tensor] = []

    def look(attention: Any, inputs: tuple[Tensor, list[tuple[int, int]]]) -> None:
        qkv, shapes = inputs
        query, key, _ = attention.split_heads(qkv, *shapes[0])  # [B, H, 1 + N, D]
        scores = query[:, :, :1] * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
        found.append(scores.float().softmax(dim=-1)[:, :, 0, 1:].mean(dim=1))

    last = backbone.blocks[-1]
    hooks = [
        last.attn.register_forward_pre_hook(look),
        last.register_forward_hook(lambda block, inputs, tokens: found.append(tokens)),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def most_attended(patches: Tensor, attention: Tensor) -> Tensor:
    """Means of the k patches [B, N, C] with the highest attention [B, N], for k in PARTS (all
    patches where there are fewer), and of all: [B, 7, C]."""
    order = attention.argsort(dim=1, descending=True, stable=True)  # [B, N]
    ranked = patches.take_along_dim(order.unsqueeze(2), dim=1)
    return torch.stack([ranked[:, :k].mean(dim=1) for k in (*PARTS, patches.shape[1])], dim=1)


def normalized(images: Tensor, device: torch.device | str) -> Tensor:
    """Pixels uint8 [B, 3, S, S] -> what a backbone takes, float32 on `device`."""
    mean, std = (torch.tensor(c).view(3, 1, 1).to(device, non_blocking=True) for c in (MEAN, STD))
    return images.to(device, non_blocking=True).float().div_(255).sub_(mean).div_(std)


def image_batches(
    photos: PhotoViews,
    indices: Sequence[int] | np.ndarray,
    how: Extraction,
    modules: Sequence[nn.Module],
    epoch: int | None = None,
) -> Generator[tuple[ViewBatch, Tensor], None, None]:
    """Batches of the photos that can be read, and their images, normalized, on the device; the
    others are logged by name. `modules` are in evaluation mode meanwhile. `epoch`: of that epoch's
    random views, see `view_batches`."""
    pinned = torch.device(how.device).type == "cuda"
    views = view_batches(photos, indices, how.batch_size, how.threads, epoch, pinned)
    with evaluating(*modules), closing(views):
        for batch in views:
            for reason in batch.unreadable:
                log.warning("left out of the evaluation: %s", reason)
            if len(batch.indices):
                yield batch, normalized(batch.images, how.device)


def feature_batches(
    backbone: nn.Module,
    photos: PhotoSet,
    names: Sequence[str],
    indices: Sequence[int] | np.ndarray,
    how: Extraction,
    head: IBOTHead | None = None,
    epoch: int | None = None,
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Photos' indices int64 [b] and their features by name, [b, ...], in the order of `indices`.

    Decoding, the forward pass and the copy to the CPU overlap. Photos as in `image_batches`. Raises
    ValueError for NaN features.
    """
    late: tuple[np.ndarray, dict[str, Tensor]] | None = None
    modules = [module for module in (backbone, head) if module is not None]
    with closing(image_batches(photos, indices, how, modules, epoch)) as batches:
        for batch, images in batches:
            with torch.inference_mode(), how.autocast():
                found = tokens_of(backbone, head, images, names)
            if late is not None:  # a batch later, so that a GPU has work while this waits
                yield late[0], _to_numpy(late[1])
            late = batch.indices, found
    if late is not None:
        yield late[0], _to_numpy(late[1])


def _to_numpy(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    found = {n: (t.float() if t.is_floating_point() else t).cpu() for n, t in tensors.items()}
    check_finite(*found.values())
    # NumPy's memory: tensors made in inference mode would be barred from training on them.
    return {name: tensor.numpy() for name, tensor in found.items()}


def check_finite(*outputs: Tensor) -> None:
    """Raise ValueError for outputs of a network that hold NaN or infinity. What is computed from
    them (the class of the largest logit, the nearest neighbor) may look like a result."""
    if not all(bool(one.isfinite().all()) for one in outputs):
        raise ValueError(
            "outputs of the network hold NaN or infinity; it is broken or has diverged"
            " (or try --precision fp32)"
        )


def class_attention(backbone: Any, images: Tensor) -> Tensor:
    """What the class token of a ViT pays each patch of normalized images [B, 3, S, S] in the last
    block, by head: float32 [B, H, N]. Raises ValueError as `check_finite`."""
    attention = backbone.get_last_selfattention(images)[:, :, 0, 1:].float()
    check_finite(attention)
    return attention


Allocate = Callable[[str, tuple[int, ...], np.dtype], np.ndarray]


def collect(
    batches: Iterator[tuple[np.ndarray, dict[str, np.ndarray]]], rows: int, allocate: Allocate
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Concatenate batches into arrays of `rows` rows that `allocate(name, shape, dtype)`
    makes: arrays and indices int64, cut to what was read."""
    arrays: dict[str, np.ndarray] = {}
    indices, read = np.empty(rows, np.int64), 0
    for index, found in batches:
        for name, values in found.items():
            if name not in arrays:
                arrays[name] = allocate(name, (rows, *values.shape[1:]), values.dtype)
            arrays[name][read : read + len(index)] = values
        indices[read : read + len(index)] = index
        read += len(index)
    return {name: array[:read] for name, array in arrays.items()}, indices[:read]


def check_any(photos: PhotoSet, read: int) -> None:
    """Raise ValueError if nothing could be read."""
    if not read:
        raise ValueError(f"none of the {len(photos)} photos of {photos.path} can be read")


def check_read(photos: PhotoSet, read: int) -> None:
    """Count what was left out in the log. Raises ValueError if nothing could be read."""
    check_any(photos, read)
    if read < len(photos):
        log.warning("%d of %d photos of %s left out", len(photos) - read, len(photos), photos.path)


def extract(
    backbone: nn.Module,
    photos: PhotoSet,
    names: Sequence[str],
    how: Extraction,
    head: IBOTHead | None = None,
) -> Features:
    """Features of all photos, in memory. `evaluation.frozen.cache` keeps them on disk instead.

    backbone and head are on `how.device` and left as they were. Unreadable photos are left out:
    each is logged by name, then counted. Raises ValueError if none can be read.
    """
    batches = feature_batches(backbone, photos, names, range(len(photos)), how, head)
    arrays, indices = collect(
        batches, len(photos), lambda name, shape, dtype: np.empty(shape, dtype)
    )
    check_read(photos, len(indices))
    return Features(arrays, torch.from_numpy(photos.labels[indices]))
