"""The masked patches of a batch, and the weight of each in the loss."""

from typing import NamedTuple

import torch
from torch import Tensor

# The number of masked patches is rounded up to a multiple of this fraction of all patches.
BUCKETS = 32


class MaskedPatches(NamedTuple):
    """The masked patches of a batch. Rows beyond their number are padding of weight zero."""

    places: Tensor  # int64 [M], indices into the V * B * N patches, ascending; padding is 0
    weight: Tensor  # float64 [M], 1 / (V * B * masked patches of the image); padding is 0


def masked_patches(masks: Tensor, device: torch.device, rows: int | None = None) -> MaskedPatches:
    """The True patches of `masks`, bool [V, B, h, w], on `device`, padded to `rows` rows.

    The weights give the published mean: over the masked patches of an image, then over the images
    of a view, masked or not, then over views. `rows` defaults to `bucket_size` on CUDA, so that the
    allocator, the compiler, and CUDA graphs see few shapes, and to the exact number elsewhere. Pass
    masks on the CPU, where the loader draws them: counting on the device makes the host wait.
    Raises ValueError if `rows` is too small.
    """
    flat = masks.flatten(2).flatten(0, 1)  # [V * B, N]
    places = flat.flatten().nonzero().squeeze(1)
    if rows is None:
        rows = bucket_size(masks) if device.type == "cuda" else len(places)
    if len(places) > rows:
        raise ValueError(f"{len(places)} masked patches do not fit in {rows} rows")
    per_image = flat.sum(dim=1)  # [V * B]
    images = places // max(1, flat.shape[1])
    weight = 1 / (len(flat) * per_image[images].to(torch.float64))
    padding = (0, rows - len(places))
    return MaskedPatches(
        to_device(torch.nn.functional.pad(places, padding), device),
        to_device(torch.nn.functional.pad(weight, padding), device),
    )


def bucket_size(masks: Tensor, parts: int = 1) -> int:
    """Rows for the masked patches of each of `parts` equal parts of the batch: the number in the
    fullest part, rounded up to one of BUCKETS sizes. `masks` are bool [V, B, h, w]."""
    counts = [int(part.sum()) for part in masks.chunk(parts, dim=1)]
    step = -(-masks.numel() // (parts * BUCKETS))
    return max(1, -(-max(counts) // step)) * step


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A copy from the CPU to CUDA is queued, and the host does not wait."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
