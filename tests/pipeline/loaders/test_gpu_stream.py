"""Photos through FFCV's threads to the GPU croppers, or to Triton's interpreter of them.

The interpreter must be chosen before kernels are decorated: one test runs another in a process of
its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ibeton.pipeline.batch import normalized
from ibeton.pipeline.convert.converter import ConvertOptions, convert
from ibeton.pipeline.loaders.replacements import Replacements
from ibeton.pipeline.sampling.draws import published_views
from ibeton.pipeline.sampling.order import epoch_order, rank_batches
from ibeton.pipeline.store.beton import BetonReader

ffcv = pytest.importorskip("ffcv", reason="ffcv is not installed: make ffcv")
pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
VIEWS = published_views(2, 2, 24, 16, (0.25, 1.0), (0.05, 0.25))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
on_a_device = pytest.mark.skipif(
    not INTERPRETED and DEVICE.type == "cpu", reason="runs under Triton's interpreter, see below"
)


def batches_of(count: int, epoch: int, size: int = 4) -> np.ndarray:
    return rank_batches(epoch_order(count, 0, epoch), size, 0, 1)


@on_a_device
@pytest.mark.gpu if DEVICE.type == "cuda" else lambda test: test
def test_views_equal_those_of_the_cpu(beton: Path, mended_interpreter: None) -> None:
    from ibeton.pipeline.crops.gpu import GpuCropper
    from ibeton.pipeline.loaders.ffcv import FfcvCrops
    from ibeton.pipeline.loaders.ffcv_pixels import FfcvPixels
    from ibeton.pipeline.loaders.gpu_stream import GpuFeed

    replacements = Replacements(BetonReader(beton), VIEWS, 3)
    wanted = batches_of(48, 1)[:3]
    on_cpu = FfcvCrops(str(beton), VIEWS, 2, 4, 1, 3, 2, replacements)
    source = FfcvPixels(str(beton), 4, 1, 2, replacements, pinned=DEVICE.type == "cuda")
    cropper = GpuCropper(VIEWS, 2, MEAN, STD, DEVICE, torch.float32)
    feed = GpuFeed(source, VIEWS, 3, cropper, DEVICE)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    pairs = zip(on_cpu.batches(1, wanted.copy()), feed.batches(1, wanted), strict=True)
    count = 0
    for expected, found in pairs:
        assert torch.equal(found.indices, expected.indices)
        for name in ("global_crops", "local_crops"):
            views = normalized(getattr(expected, name), mean, std)
            assert torch.equal(getattr(found, name).cpu(), views)
        count += 1
    assert count == 3
    on_cpu.close()
    feed.close()


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
    from ibeton.pipeline.loaders.ffcv_pixels import FfcvPixels

    path = tmp_path / "photos.beton"
    convert(photo_folder, path, ConvertOptions(workers=1, write_mode=mode))
    reader = BetonReader(path)
    source = FfcvPixels(str(path), 4, 1, 2, Replacements(reader, VIEWS, 3), pinned=False)
    seen = []
    for epoch in range(2):
        batches = batches_of(48, epoch)
        for wanted, decoded in zip(batches, source.photos(batches.copy()), strict=True):
            assert decoded.indices.tolist() == wanted.tolist()
            end = 0
            for b, index in enumerate(wanted):
                height, width = int(decoded.heights[b]), int(decoded.widths[b])
                assert decoded.offsets[b] == end, "packed, not padded"
                end += 3 * height * width
                photo = decoded.pixels[decoded.offsets[b] : end].reshape(height, width, 3)
                off = photo.numpy().astype(int) - reader.pixels(int(index))
                assert abs(off).mean() < (2 if mode == "keep" else 1e-9)  # two JPEG decoders
            assert decoded.pixels.numel() == end
            seen += wanted.tolist()
    assert sorted(seen) == sorted([*range(48), *range(48)])
    source.close()


@needs_no_gpu
def test_a_photo_that_does_not_decode_gives_way_to_its_neighbor(
    beton: Path, tmp_path: Path
) -> None:
    from ibeton.pipeline.loaders.ffcv_pixels import FfcvPixels

    path = tmp_path / "broken.beton"
    path.write_bytes(beton.read_bytes())
    reader = BetonReader(path)
    start = path.read_bytes().find(bytes(reader.photo_bytes(5)))
    with path.open("r+b") as file:
        file.seek(start + 2)
        file.write(bytes(40))  # the header of photo 5
    replacements = Replacements(BetonReader(path), VIEWS, 3)
    source = FfcvPixels(str(path), 4, 1, 2, replacements, pinned=False)
    wanted = np.array([[3, 5, 7, 9]])
    (decoded,) = source.photos(wanted.copy())
    assert decoded.indices.tolist() == [3, 6, 7, 9]
    height, width = int(decoded.heights[1]), int(decoded.widths[1])
    start = int(decoded.offsets[1])
    photo = decoded.pixels[start : start + 3 * height * width].reshape(height, width, 3)
    assert np.array_equal(photo.numpy(), reader.pixels(6))
    assert list(replacements.unreadable) == [5]
    source.close()


@needs_no_gpu
def test_epochs_may_be_left_half_way(beton: Path) -> None:
    from ibeton.pipeline.loaders.ffcv_pixels import FfcvPixels

    replacements = Replacements(BetonReader(beton), VIEWS, 3)
    source = FfcvPixels(str(beton), 4, 1, 2, replacements, pinned=False)
    for epoch in range(4):
        for number, decoded in enumerate(source.photos(batches_of(48, epoch))):
            assert len(decoded.offsets) == 4
            if number == epoch:
                break
    source.close()
