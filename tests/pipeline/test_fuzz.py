"""Damage of every kind, through the converter and each loader: no traceback, no hang, no crash.

Each part runs in a process of its own, which a crash would end: what it has to say comes last.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from PIL import Image
from smooth_photos import smooth_photo

from ibeton.pipeline.convert import ConvertOptions, convert
from ibeton.pipeline.loaders import LOADERS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]  # hours beside other work
PHOTOS, FILES, SOME = 1000, 1000, 50

LOAD = """
import sys
from ibeton.pipeline import PipelineConfig, build_loader
config = PipelineConfig(
    data=sys.argv[1], loader=sys.argv[2], batch_size=8, workers=2, local_crops_number=1,
    global_crops_size=32, local_crops_size=16, patch_size=8,
)
if __name__ == "__main__":
    loader = build_loader(config)
    photos = sum(len(batch.indices) for batch in loader.epoch(0))
    loader.close()
    assert photos == len(loader.photos) // 8 * 8
    print("done", len(loader.unreadable))
"""

OPEN = """
import sys
from pathlib import Path
from ibeton.pipeline import PipelineConfig, build_loader
refused = read = 0
for path in sorted(Path(sys.argv[1]).glob("*.beton")):
    try:
        loader = build_loader(PipelineConfig(
            data=str(path), loader=sys.argv[2], batch_size=4, workers=1, local_crops_number=0,
            global_crops_size=16, patch_size=8,
        ))
        read += sum(1 for _ in loader.epoch(0))
        loader.close()
    except (ValueError, FileNotFoundError, OSError) as error:
        assert "\\n" not in str(error), error
        refused += 1
print("done", refused, read)
"""


def damaged(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """Bits flipped, cut, spliced with another file, or odd markers put in."""
    kind, place = rng.integers(5), int(rng.integers(2, len(data)))
    if kind == 0:
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 20))):
            changed[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    if kind == 1:
        return data[:place] + (b"\xff\xd9" if rng.integers(2) else b"")
    if kind == 2:
        return data[:place] + other[int(rng.integers(len(other))) :]
    if kind == 3:
        marker = bytes([0xFF, int(rng.integers(0xC0, 0x100))])
        return data[:place] + marker + rng.bytes(int(rng.integers(40))) + data[place:]
    return data[:place] + rng.bytes(int(rng.integers(1, 400))) + data[place + 200 :]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Damaged photos, among a few sound ones."""
    root, rng = tmp_path_factory.mktemp("fuzz"), np.random.default_rng(7)
    settings = ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2})
    sound = []
    for i, options in enumerate(settings):
        for mode in ("RGB", "L"):
            path = root / f"sound{i}{mode}.jpg"
            smooth_photo(rng, 60 + i, 50).convert(mode).save(path, **options)
            sound.append(path.read_bytes())
    for i in range(PHOTOS):
        data, other = (sound[int(rng.integers(len(sound)))] for _ in range(2))
        (root / f"{i:04d}.jpg").write_bytes(damaged(data, rng, other))
        if i % 20 == 0:
            (root / f"{i:04d}-sound.jpg").write_bytes(data)
    return root


def run(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def beton(photos: Path) -> Path:
    path = photos.with_name("fuzz.beton")
    before = {file.name: file.read_bytes() for file in photos.iterdir()}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.convert", str(photos), str(path), "--overwrite"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr.count("Traceback")
    assert before == {file.name: file.read_bytes() for file in photos.iterdir()}
    return path


@pytest.mark.parametrize("kind", ["pil", "dali"])
def test_damaged_photos_go_through_each_loader_from_a_folder(photos: Path, kind: str) -> None:
    if problem := LOADERS[kind].problem():
        pytest.skip(problem)
    assert "done" in run(LOAD, str(photos), kind)


@pytest.mark.parametrize("kind", ["ffcv", "pil", "dali"])
def test_damaged_photos_go_through_each_loader_from_a_beton(beton: Path, kind: str) -> None:
    if problem := LOADERS[kind].problem():
        pytest.skip(problem)
    assert "done" in run(LOAD, str(beton), kind)


def test_damaged_beton_files_are_refused_or_read(tmp_path: Path) -> None:
    if problem := LOADERS["ffcv"].problem():
        pytest.skip(problem)
    rng = np.random.default_rng(8)
    (tmp_path / "src").mkdir()
    for i in range(8):
        pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "src" / f"{i}.jpg")
    convert(tmp_path / "src", tmp_path / "a.beton", ConvertOptions(workers=1))
    content = (tmp_path / "a.beton").read_bytes()
    tables = [*range(24), *range(2106, 2106 + 8 * 32), *range(len(content) - 8 * 24, len(content))]
    folder = tmp_path / "damaged"
    folder.mkdir()
    for begin in range(0, FILES, SOME):  # few at a time: each takes 8 MB
        for i in range(begin, begin + SOME):
            changed = bytearray(content)
            for _ in range(int(rng.integers(1, 4))):  # where it matters, and among the photos
                place = tables[int(rng.integers(len(tables)))]
                if rng.integers(4) == 0:
                    place = int(rng.integers(8 << 20, len(content)))
                changed[place] = int(rng.integers(256))
            end = int(rng.integers(len(content))) if i % 10 == 0 else len(content)
            (folder / f"{i - begin}.beton").write_bytes(bytes(changed[:end]))
        assert "done" in run(OPEN, str(folder), "ffcv")
