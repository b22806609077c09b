"""Photos through the loader's threads to the GPU croppers, or to Triton's interpreter of them.

The interpreter must be chosen before kernels are decorated: one test runs another in a process of
its own.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ibeton.pipeline import PipelineConfig
from ibeton.pipeline.batch import BatchPlan, normalized
from ibeton.pipeline.convert.converter import ConvertOptions, convert
from ibeton.pipeline.loaders import LOADERS
from ibeton.pipeline.loaders.context import LoaderContext, context_of
from ibeton.pipeline.loaders.ffcv import FfcvCrops, FfcvPixels
from ibeton.pipeline.sampling.draws import published_views
from ibeton.pipeline.sampling.order import epoch_order, rank_batches
from ibeton.pipeline.store.beton import BetonReader

if problem := LOADERS["ffcv"].problem():
    pytest.skip(problem, allow_module_level=True)
pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
VIEWS = published_views(2, 2, 24, 16, (0.25, 1.0), (0.05, 0.25))
CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
on_a_device = pytest.mark.skipif(
    not INTERPRETED and DEVICE.type == "cpu", reason="runs under Triton's interpreter, see below"
)


def plans_of(count: int, epoch: int, size: int = 4) -> list[BatchPlan]:
    batches = rank_batches(epoch_order(count, 0, epoch), size, 0, 1)
    return [BatchPlan(epoch, indices) for indices in batches]


def context_for(path: Path, device: torch.device = CPU) -> LoaderContext:
    config = PipelineConfig(data=str(path), batch_size=4, workers=2, seed=3)
    return context_of(config, BetonReader(path), device, views=VIEWS)


@on_a_device
@pytest.mark.gpu if DEVICE.type == "cuda" else lambda test: test
def test_views_equal_those_of_the_cpu(beton: Path, mended_interpreter: None) -> None:
    from ibeton.pipeline.loaders.gpu_stream import GpuCrops

    plans = plans_of(48, 1)[:3]
    on_cpu = FfcvCrops(context_for(beton))
    context = context_for(beton, DEVICE)
    on_gpu = GpuCrops(context, FfcvPixels(context))
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    count = 0
    for (plan, expected), (other, found) in zip(
        on_cpu.stream(iter(plans)), on_gpu.stream(iter(plans)), strict=True
    ):
        assert plan is other
        assert torch.equal(found.indices, expected.indices)
        for name in ("global_crops", "local_crops"):
            views = normalized(getattr(expected, name), mean, std)
            assert torch.equal(getattr(found, name).cpu(), views)
        count += 1
    assert count == 3


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="starts the tests above")
def test_views_equal_those_of_the_cpu_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "equal_those_of_the_cpu and not interpreter"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


needs_no_gpu = pytest.mark.skipif(INTERPRETED, reason="has nothing to do with kernels")


@needs_no_gpu
@pytest.mark.parametrize("mode", ["keep", "raw"])
def test_pixels_are_packed_and_those_of_the_photos(
    photo_folder: Path, tmp_path: Path, mode: str
) -> None:
    path = tmp_path / "photos.beton"
    convert(photo_folder, path, ConvertOptions(workers=1, write_mode=mode))
    reader = BetonReader(path)
    plans = [plan for epoch in range(2) for plan in plans_of(48, epoch)]
    seen = []
    for plan, decoded in FfcvPixels(context_for(path)).stream(iter(plans)):
        assert decoded.indices.tolist() == plan.indices.tolist()
        (pixels,), end = decoded.parts, 0
        for b, index in enumerate(plan.indices):
            height, width = int(decoded.heights[b]), int(decoded.widths[b])
            assert decoded.offsets[b] == end, "packed, not padded"
            end += 3 * height * width
            photo = pixels[decoded.offsets[b] : end].reshape(height, width, 3)
            assert np.array_equal(photo.numpy(), reader.pixels(int(index)))
        assert pixels.numel() == end
        seen += plan.indices.tolist()
    assert sorted(seen) == sorted([*range(48), *range(48)])


@needs_no_gpu
def test_a_photo_that_does_not_decode_gives_way_to_its_neighbor(
    beton: Path, tmp_path: Path
) -> None:
    path = tmp_path / "broken.beton"
    path.write_bytes(beton.read_bytes())
    start = int(BetonReader(path).pointers[5])
    with path.open("r+b") as file:
        file.seek(start + 2)
        file.write(bytes(40))  # the header of photo 5
    context = context_for(path)
    plan = BatchPlan(0, np.array([3, 5, 7, 9]))
    ((_, decoded),) = FfcvPixels(context).stream(iter([plan]))
    assert decoded.indices.tolist() == [3, 6, 7, 9]
    pixels = torch.cat(decoded.parts)
    for b, index in enumerate([3, 6, 7, 9]):
        height, width = int(decoded.heights[b]), int(decoded.widths[b])
        start = int(decoded.offsets[b])
        photo = pixels[start : start + 3 * height * width].reshape(height, width, 3)
        assert np.array_equal(photo.numpy(), BetonReader(path).pixels(index))
    assert list(context.replacements.unreadable) == [5]


@needs_no_gpu
def test_streams_may_be_left_half_way(beton: Path) -> None:
    before = threading.active_count()
    for epoch in range(4):
        stream = FfcvPixels(context_for(beton)).stream(iter(plans_of(48, epoch)))
        for _ in range(epoch + 1):
            _, decoded = next(stream)
            assert len(decoded.offsets) == 4
        stream.close()
    assert threading.active_count() <= before
