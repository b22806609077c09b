"""Places and weights of masked patches."""

import pytest
import torch

from ibeton.model.masking import BUCKETS, masked_patches

CPU = torch.device("cpu")


def test_places_and_weights():
    masks = torch.zeros(2, 2, 2, 3, dtype=torch.bool)
    masks[0, 1, 1, 2] = masks[1, 0, 0, 0] = masks[1, 0, 1, 1] = True
    patches = masked_patches(masks, CPU)
    assert patches.places.tolist() == [6 + 5, 12 + 0, 12 + 4]
    assert patches.weight.tolist() == [1 / 4, 1 / 8, 1 / 8]


def test_no_masked_patch():
    patches = masked_patches(torch.zeros(2, 3, 4, 4, dtype=torch.bool), CPU)
    assert patches.places.shape == patches.weight.shape == (0,)


def test_weights_are_the_published_mean():
    """Mean over an image's masked patches, over images, over views; images without count as 0."""
    g = torch.Generator().manual_seed(0)
    masks, values = torch.rand(2, 5, 4, 4, generator=g) < 0.2, torch.rand(2, 5, 16, generator=g)
    masks[0, 2] = False
    patches = masked_patches(masks, CPU)
    flat = masks.flatten(2)
    by_image = (values * flat).sum(-1) / flat.sum(-1).clamp(min=1)
    expected = by_image.mean(dim=1).mean()
    mine = (values.flatten()[patches.places] * patches.weight).sum()
    torch.testing.assert_close(mine.float(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_padding_on_cuda_weighs_nothing():
    masks = torch.rand(2, 8, 14, 14) < 0.3
    exact = masked_patches(masks, CPU)
    padded = masked_patches(masks, torch.device("cuda"))
    count = len(exact.places)
    assert len(padded.places) % (masks.numel() // BUCKETS) == 0
    assert torch.equal(padded.places[:count].cpu(), exact.places)
    assert torch.equal(padded.weight[:count].cpu(), exact.weight)
    assert not padded.weight[count:].any()
