"""Small sets of real JPEG files, drawn once a session."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.convert import ConvertOptions, convert

COUNT = 48


def smooth_photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Coarse noise, enlarged: has edges, gradients and colour at every place."""
    coarse = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 JPEGs of four classes and many sizes."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        folder = root / f"class{i % 4}"
        folder.mkdir(exist_ok=True)
        width, height = (int(side) for side in rng.integers(40, 260, 2))
        smooth_photo(rng, width, height).save(folder / f"{i:03d}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def beton(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same photos as a .beton file, bytes untouched."""
    path = tmp_path_factory.mktemp("beton") / "photos.beton"
    convert(photo_folder, path, ConvertOptions(workers=1))
    return path


@pytest.fixture(scope="session")
def raw_beton(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same photos as pixels."""
    path = tmp_path_factory.mktemp("raw") / "photos.beton"
    convert(photo_folder, path, ConvertOptions(write_mode="raw", workers=1))
    return path


@pytest.fixture
def mended_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter takes loop bounds in a way that NumPy 2.4 refuses (triton #9171),
    and its time goes into the number of operations, however large their blocks."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    from pipeline import gpu_kernels

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_mend)
    monkeypatch.setattr(gpu_kernels, "BLOCK_PIXELS", 4096)
    monkeypatch.setattr(gpu_kernels, "BLOCK_TAPS", 64)
