"""The blur is Pillow's for every radius, not only for those that a few photos draw."""

import numpy as np
import pytest
from PIL import Image, ImageFilter
from pillow_parity import SAME_ARITHMETIC

from ibeton.pipeline.crops.blur import gaussian_blur

NOISE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
PHOTO = Image.fromarray(NOISE)


def equal(radius: float) -> bool:
    radius = float(np.float32(radius))
    view = np.ascontiguousarray(NOISE.transpose(2, 0, 1))
    gaussian_blur(view, radius)
    theirs = np.asarray(PHOTO.filter(ImageFilter.GaussianBlur(radius)))
    return np.array_equal(view.transpose(1, 2, 0), theirs)


@pytest.mark.skipif(not SAME_ARITHMETIC, reason="this Pillow computes in another way")
def test_twenty_thousand_radii_blur_as_pillow_does() -> None:
    rng = np.random.default_rng(1)
    radii = [1.2144614458084106, 0.3396832048892975]  # differed by a level in float64
    radii += rng.uniform(0.1, 2.0, 19_000).tolist()  # the recipe's
    radii += rng.uniform(2.0, 12.0, 998).tolist()
    assert [radius for radius in radii if not equal(radius)] == []


def test_the_gpus_boxes_have_the_same_radii() -> None:
    pytest.importorskip("triton")
    from ibeton.pipeline.crops.blur import box_radius
    from ibeton.pipeline.crops.gpu import _boxes

    radii = np.random.default_rng(2).uniform(0.1, 12.0, 20_000).astype(np.float32)
    blurred, whole, weight, edge = _boxes(radii).T
    for i, radius in enumerate(radii):
        box = box_radius(radius)
        assert bool(blurred[i]) == (box > 0)
        if box > 0:
            assert whole[i] == int(box)
            one = np.float32(1 << 24) / np.float32(np.float32(box) * np.float32(2) + np.float32(1))
            assert weight[i] == int(one)
            assert edge[i] == ((1 << 24) - (whole[i] * 2 + 1) * weight[i]) // 2
