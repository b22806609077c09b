"""What `make` does besides calling programs that have tests of their own."""

import shutil
import subprocess
from pathlib import Path

import pytest
from paths import ROOT


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_clean_keeps_runs_and_data_of_ones_own(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    mine = ("runs/vit_s/checkpoint.pt", "data/photos/one.jpg", "imagenet.beton", ".venv/installed")
    caches = ("data/synthetic/one.jpg", ".pytest_cache/x", ".ruff_cache/x", ".mypy_cache/x")
    for name in (*mine, *caches):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"Makefile", *mine}
