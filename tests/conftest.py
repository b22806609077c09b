"""Small runs in real processes, started by the dozen; and the order of the files."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import FORKER, PER_EPOCH, SMALL, Process, Start

from ibeton.pipeline.convert.converter import ConvertOptions, convert


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with few and long tests first, so that both workers of `make test` end together."""
    long = ("test_train", "training", "finetune", "dense", "loaders")
    items.sort(key=lambda item: not {*item.path.parts, item.path.stem} & {*long})


@pytest.fixture(scope="session")
def forker() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(FORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    yield process
    assert process.stdin is not None
    process.stdin.close()
    process.kill()  # and with it a run that is left
    process.wait()


@pytest.fixture
def start(forker: subprocess.Popen[str], tiny: Path, tmp_path: Path) -> Start:
    """Begins a run: `start(folder, *options, fault="", small=SMALL)`; one at a time."""

    def begin(folder: Path, *options: str, fault: str = "", small: list[str] = SMALL) -> Process:
        arguments = [*small, "--data", str(tiny), "--output-dir", str(folder), *options]
        output = tmp_path / f"{folder.name}.said"
        job = {"arguments": arguments, "output": str(output), "fault": fault}
        assert forker.stdin is not None
        forker.stdin.write(json.dumps(job) + "\n")
        forker.stdin.flush()
        return Process(forker, folder, output)

    return begin


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 small photos of two classes: dark ones and light ones."""
    root = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    for i in range(8 * PER_EPOCH):
        folder = root / ("dark", "light")[i % 2]
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 128, (40, 48, 3), dtype=np.uint8) + 128 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg")
    return root


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Path:
    """The same as a .beton file."""
    path = tiny_folder.parent / f"{tiny_folder.name}.beton"
    convert(tiny_folder, path, ConvertOptions(workers=1))
    return path
