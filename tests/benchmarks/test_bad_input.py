"""What a benchmark cannot read is one sentence with status 2."""

import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("pipeline", "photos", "is not a .beton file; make one: ibeton convert"),
        pytest.param(
            *("convert", "missing", "does not exist; give a folder of photos or a tar"),
            marks=pytest.mark.slow,
        ),
        pytest.param("loader", "photos", "is not a .beton file", marks=pytest.mark.slow),
        pytest.param("crops_gpu", "missing", "does not exist", marks=pytest.mark.slow),
        pytest.param("evaluation/features", "missing", "does not exist", marks=pytest.mark.slow),
        pytest.param("evaluation/finetune", "missing", "does not exist", marks=pytest.mark.slow),
    ],
)
def test_data_that_cannot_be_read_is_a_sentence(
    name: str, data: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    command = [sys.executable, f"benchmarks/{name}.py", "--data", str(tmp_path / data)]
    command += ["--interpreted"] if name == "crops_gpu" else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "error: " in last
    assert says in last
    assert "Traceback" not in done.stderr
