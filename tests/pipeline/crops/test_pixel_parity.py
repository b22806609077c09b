"""The ffcv loader's views of real photos against the published operations, with the same draws.

`python tests/pipeline/crops/test_pixel_parity.py` prints the figures that docs/parity.md states.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_photos import camera_photos
from PIL import Image
from pillow_parity import assert_pillows

from ibeton.pipeline import PipelineConfig, build_loader
from ibeton.pipeline.convert.converter import ConvertOptions, convert
from ibeton.pipeline.crops.reference import cut_views_reference
from ibeton.pipeline.loaders import LOADERS
from ibeton.pipeline.sampling.draws import draw_views
from ibeton.pipeline.store.beton import BetonReader

SHOWN = 24


def differences(folder: Path) -> np.ndarray:
    """|ours - theirs| on 0..255 of all 12 views of each photo."""
    path = folder / "photos.beton"
    camera_photos(folder / "photos", SHOWN)
    convert(folder / "photos", path, ConvertOptions(workers=1))
    config = PipelineConfig(data=str(path), loader="ffcv", batch_size=8, workers=1, seed=5)
    views, reader = config.views(), BetonReader(path)
    loader = build_loader(replace(config))
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (config.mean, config.std))
    found: list[np.ndarray] = []
    for batch in loader.epoch(2):
        for i, index in enumerate(batch.indices.tolist()):
            ours = [*batch.global_crops[:, i], *batch.local_crops[:, i]]
            pixels = reader.pixels(index)
            draws = draw_views(views, config.seed, 2, index, *pixels.shape[:2])
            theirs = cut_views_reference(
                Image.fromarray(pixels), draws, [view.size for view in views]
            )
            for view, reference in zip(ours, theirs, strict=True):
                bytes_ = ((view * std + mean) * 255).round().permute(1, 2, 0).numpy()
                found.append(np.abs(bytes_ - reference).astype(np.uint8).ravel())
    loader.close()
    assert len(found) == SHOWN * 12
    return np.concatenate(found)


def test_views_of_the_ffcv_loader_are_the_published_ones(tmp_path: Path) -> None:
    if problem := LOADERS["ffcv"].problem():
        pytest.skip(problem)
    found = differences(tmp_path)
    assert_pillows(found, np.zeros_like(found))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        values = differences(Path(name))
        print(
            f"against Pillow's operations on Pillow's pixels: mean {values.mean():.4f},"
            f" 99.9th percentile {np.percentile(values, 99.9):.0f}, largest {values.max()}"
        )
