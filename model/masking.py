"""Which patches the loss looks at: the places of the masked ones, and what each counts."""

from typing import NamedTuple

import torch
from torch import Tensor

# On CUDA the number of masked patches is rounded up to a multiple of this share of all patches.
SHAPES = 32


class MaskedPatches(NamedTuple):
    """The masked patches of a batch; rows above their number are padding that weighs nothing."""

    places: Tensor  # int64 [M], places among the V * B * N patches, ascending, padding 0
    weight: Tensor  # float64 [M], 1 / (V * B * masked patches of the image), padding 0


def masked_patches(masks: Tensor, device: torch.device) -> MaskedPatches:
    """masks bool [V, B, h, w] -> the masked patches, on `device`.

    The weights make the published mean: over an image's masked patches, then over the images of a
    view, masked or not, then over views. On CUDA, M takes few values, so that allocator, compiler
    and graphs meet few shapes. Give masks on the CPU, where the loader draws them: counting masks
    on the device makes the host wait for it.
    """
    flat = masks.flatten(2).flatten(0, 1)  # [V * B, N]
    index = flat.flatten().nonzero().squeeze(1)
    per_image = flat.sum(dim=1)  # [V * B]
    images = index // max(1, flat.shape[1])
    weight = 1 / (len(flat) * per_image[images].to(torch.float64))
    if device.type == "cuda":
        step = -(-flat.numel() // SHAPES)
        padding = max(1, -(-len(index) // step)) * step - len(index)
        index = torch.nn.functional.pad(index, (0, padding))
        weight = torch.nn.functional.pad(weight, (0, padding))
        if not masks.is_cuda:
            index, weight = index.pin_memory(), weight.pin_memory()
    return MaskedPatches(index.to(device, non_blocking=True), weight.to(device, non_blocking=True))
