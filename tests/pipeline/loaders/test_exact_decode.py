"""All loaders give the same views, byte for byte, of photos that their decoders could differ on."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image
from pillow_parity import SAME_ARITHMETIC
from smooth_photos import smooth_photo

from ibeton.pipeline import PipelineConfig, build_loader
from ibeton.pipeline.convert import ConvertOptions, convert, verify_existing
from ibeton.pipeline.loaders import LOADERS
from ibeton.pipeline.store.beton import JPG, BetonReader
from ibeton.pipeline.store.decode import UnreadablePhoto, decode_photo
from ibeton.pipeline.store.turbojpeg import Decoder

pytestmark = pytest.mark.skipif(
    bool(LOADERS["ffcv"].problem()), reason="libturbojpeg is not installed: make ffcv"
)
SMALL = PipelineConfig(
    batch_size=8,
    workers=2,
    local_crops_number=2,
    global_crops_size=32,
    local_crops_size=16,
    patch_size=8,
)


def jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """JPEGs of all kinds by name: noise shows every rounding of a decoder."""
    rng = np.random.default_rng(4)
    noise = Image.fromarray(rng.integers(0, 256, (61, 83, 3), dtype=np.uint8))
    smooth = smooth_photo(rng, 90, 71)
    files = {}
    for i, photo in enumerate((noise, smooth)):
        for quality in (5, 60, 98):
            for sampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1"):
                name = f"{i}-{quality}-{sampling.replace(':', '')}"
                files[name] = jpeg(photo, quality=quality, subsampling=sampling)
            files[f"{i}-{quality}-gray"] = jpeg(photo.convert("L"), quality=quality)
            files[f"{i}-{quality}-progressive"] = jpeg(photo, quality=quality, progressive=True)
        files[f"{i}-gray-progressive"] = jpeg(photo.convert("L"), progressive=True)
        files[f"{i}-cmyk"] = jpeg(photo.convert("CMYK"))
        files[f"{i}-restarts"] = jpeg(photo, restart_marker_blocks=3)
    files["rgb"] = jpeg(noise, keep_rgb=True)
    return files


def test_libjpeg_turbo_gives_pillows_pixels(kinds: dict[str, bytes]) -> None:
    decoder = Decoder()
    for name, data in kinds.items():
        expected = decode_photo(data)
        if "cmyk" in name:
            with pytest.raises(UnreadablePhoto):
                decoder.decode(data, *expected.shape[:2])
        else:
            np.testing.assert_array_equal(decoder.decode(data, *expected.shape[:2]), expected, name)


@pytest.fixture(scope="module")
def beton(kinds: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kinds")
    (root / "photos").mkdir()
    for name, data in kinds.items():
        (root / "photos" / f"{name}.jpg").write_bytes(data)
    convert(root / "photos", root / "photos.beton", ConvertOptions(workers=1))
    return root / "photos.beton"


@pytest.mark.skipif(not SAME_ARITHMETIC, reason="this Pillow computes in another way")
@pytest.mark.parametrize("kind", ["ffcv", pytest.param("dali", marks=pytest.mark.slow)])
def test_the_views_are_the_pil_loaders_byte_for_byte(beton: Path, kind: str) -> None:
    if problem := LOADERS[kind].problem():
        pytest.skip(problem)
    loaders = [build_loader(replace(SMALL, data=str(beton), loader=name)) for name in (kind, "pil")]
    for ours, theirs in zip(*(loader.epoch(1) for loader in loaders), strict=True):
        for name in ("indices", "masks", "global_crops", "local_crops"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for loader in loaders:
        assert not loader.unreadable
        loader.close()


def test_gray_jpegs_are_stored_untouched(kinds: dict[str, bytes], beton: Path) -> None:
    reader, names = BetonReader(beton), sorted(f"{name}.jpg" for name in kinds)
    for i, name in enumerate(names):
        data = kinds[name.removesuffix(".jpg")]
        if "gray" in name:
            assert (reader.modes[i], reader.photo_bytes(i)) == (JPG, data)
    faults, good = verify_existing(str(beton), workers=1)
    assert not faults
    assert good.endswith("every photo reads as written")


@pytest.mark.slow  # FFCV compiles its loader
def test_stock_ffcv_reads_gray_photos(kinds: dict[str, bytes], tmp_path: Path) -> None:
    pytest.importorskip("ffcv", reason="ffcv is not installed: make ffcv")
    (tmp_path / "photos").mkdir()
    for name, data in kinds.items():
        if "gray" in name and name.startswith("1"):
            (tmp_path / "photos" / f"{name}.jpg").write_bytes(data)
    convert(tmp_path / "photos", tmp_path / "gray.beton", ConvertOptions(workers=1))
    program = """
import sys
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
from ffcv.loader import Loader
pipelines = {"image": [CenterCropRGBImageDecoder((64, 64), 1.0)], "label": None}
(photos,) = next(iter(Loader(sys.argv[1], 4, num_workers=1, pipelines=pipelines)))
assert photos.shape == (4, 64, 64, 3) and photos.std() > 5
assert (photos[..., 0] == photos[..., 1]).all() and (photos[..., 1] == photos[..., 2]).all()
"""
    command = [sys.executable, "-c", program, str(tmp_path / "gray.beton")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["ffcv", "dali", "pil"])
def test_a_photo_that_was_cut_and_given_an_end_marker_is_named_and_replaced(
    kinds: dict[str, bytes], tmp_path: Path, kind: str
) -> None:
    if problem := LOADERS[kind].problem():
        pytest.skip(problem)
    (tmp_path / "photos").mkdir()
    whole = kinds["0-60-420"]
    for i in range(8):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(whole)
    cut = whole[: len(whole) * 2 // 3].rstrip(b"\xff") + b"\xff\xd9"
    (tmp_path / "photos" / "3.jpg").write_bytes(cut)
    convert(tmp_path / "photos", tmp_path / "photos.beton", ConvertOptions(workers=1))
    loader = build_loader(replace(SMALL, data=str(tmp_path / "photos.beton"), loader=kind))
    (batch,) = loader.epoch(0)
    loader.close()
    assert list(loader.unreadable) == [3]
    assert "its compressed data end early" in loader.unreadable[3]
    assert sorted(batch.indices.tolist()) == [0, 1, 2, 4, 4, 5, 6, 7]
