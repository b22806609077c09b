"""Finished views, normalized: their statistics against those of the published augmentation."""

import hashlib

import numpy as np
import pytest
import torch
from paths import REFERENCE, ROOT
from PIL import Image

from ibeton.pipeline.batch import normalized
from ibeton.pipeline.config import PipelineConfig
from ibeton.pipeline.crops.cpu import cut_views
from ibeton.pipeline.sampling.draws import draw_views, published_views

AUGMENT = np.load(REFERENCE / "augment.npz")
PHOTO = ROOT.parent / str(AUGMENT["image"])
COUNT = 600
MEAN, STD = torch.tensor(PipelineConfig.mean), torch.tensor(PipelineConfig.std)


def test_normalization_is_the_published_one() -> None:
    exact = np.load(REFERENCE / "augment_exact.npz")
    image = torch.from_numpy(exact["input"]).permute(2, 0, 1)[None, None]  # [B, V, 3, H, W]
    expected = torch.from_numpy(exact["normalise/out_first_8_rows"])
    torch.testing.assert_close(
        normalized(image, MEAN, STD)[0, 0, :, :8], expected, rtol=0, atol=1e-6
    )


@pytest.fixture(scope="module")
def outputs() -> dict[str, torch.Tensor]:
    """Mean and deviation [n, 2, 3] of each channel of many views of the reference's photo."""
    if not PHOTO.is_file():
        pytest.skip("needs ../shared/data/imagenet_mini")
    assert hashlib.sha256(PHOTO.read_bytes()).hexdigest() == str(AUGMENT["image_sha256"])
    pixels = np.asarray(Image.open(PHOTO).convert("RGB"))
    views = published_views(2, 1, 224, 96, (0.25, 1), (0.05, 0.25))
    large, small = np.empty((2, 3, 224, 224), np.uint8), np.empty((1, 3, 96, 96), np.uint8)
    rows: dict[str, list[torch.Tensor]] = {"global1": [], "global2": [], "local": []}
    for index in range(COUNT):
        cut_views(pixels, draw_views(views, 1, 0, index, *pixels.shape[:2]), large, small)
        for name, crop in zip(rows, (large[0], large[1], small[0]), strict=True):
            view = normalized(torch.from_numpy(crop)[None, None], MEAN, STD)[0, 0]
            rows[name].append(torch.stack([view.mean((1, 2)), view.std((1, 2), correction=0)]))
    return {name: torch.stack(values) for name, values in rows.items()}


@pytest.mark.parametrize("name", ["global1", "global2", "local"])
def test_views_have_the_published_brightness_and_contrast(
    name: str, outputs: dict[str, torch.Tensor]
) -> None:
    case = {k.split("/")[1]: v for k, v in AUGMENT.items() if k.startswith(f"out_{name}/")}
    for column, key in enumerate(("channel_mean", "channel_std")):
        ours = outputs[name][:, column].double().numpy()
        # Standard error of the difference of the two samples' means; 4.5 of them is chance 1e-5.
        error = np.hypot(case[f"{key}_stderr"], ours.std(0) / COUNT**0.5)
        assert (np.abs(ours.mean(0) - case[key]) < 4.5 * error).all(), key
        spread = case[f"{key}_spread"]
        np.testing.assert_allclose(ours.std(0), spread, rtol=4.5 * (1 / COUNT) ** 0.5)
        quantiles = case[f"{key}_quantiles"]
        ranks = np.stack(  # where their quantiles stand among ours
            [np.searchsorted(np.sort(ours[:, c]), quantiles[:, c]) / COUNT for c in range(3)]
        )
        # Kolmogorov-Smirnov's distance for two samples, at chance 1e-5.
        bound = 2.47 * (1 / COUNT + 1 / int(case["n"])) ** 0.5
        assert np.abs(ranks - np.linspace(0, 1, len(quantiles))).max() < bound
