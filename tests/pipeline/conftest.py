"""Small sets of real JPEG files, drawn once a session."""

import os
from pathlib import Path

import numpy as np
import pytest
from made_photos import camera_photos, hard_photos
from smooth_photos import smooth_photo

from ibeton.benchmarks.harness.interpreter import adapt_interpreter
from ibeton.pipeline.convert.converter import ConvertOptions, convert

COUNT = 48


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


@pytest.fixture(scope="session")
def hard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder of corner cases, and what a loader owes for each file: see made_photos."""
    folder = tmp_path_factory.mktemp("hard")
    return folder, hard_photos(folder)


@pytest.fixture(scope="session")
def camera(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """30 JPEGs like a camera's."""
    return camera_photos(tmp_path_factory.mktemp("camera"), 30)


@pytest.fixture
def mended_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter as it should be, where a test runs under it."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        adapt_interpreter(monkeypatch.setattr)
