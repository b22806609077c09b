"""benchmarks/gpu.py without a GPU: its table of claims, and that each part runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from ibeton.benchmarks.gpu import CLAIMS, TO_MEASURE, Part, claims, parts
from ibeton.benchmarks.graph import CASES, case_of

GRAPH = {"seconds": 0.032, "host": 0.002, "launches": 12, "memory": 1}
EAGER = {"seconds": 0.040, "host": 0.020, "launches": 480, "memory": 1}
STEPS = {
    "cases": {
        "vit_s:fp16:64": {
            **{"images": 64, "flops": 8e12, "peak_flops": 7.6e14},
            **{"plain": {**EAGER, "seconds": 0.128}, "eager": EAGER, "graph": GRAPH},
        },
        "vit_s:fp16:8": {"images": 8, "graph": {**GRAPH, "host": 0.006}},
        "small:fp16:256": {"images": 256, "graph": {"problem": "out of memory"}},
    }
}


def test_what_was_not_measured_says_so(tmp_path: Path) -> None:
    rows = claims({}, parts(tmp_path, rehearse=True))
    assert rows == CLAIMS
    assert {row.measured for row in rows} == {TO_MEASURE}
    assert {row.holds for row in rows} == {None}


def test_claims_are_read_from_what_the_parts_wrote(tmp_path: Path) -> None:
    written = tmp_path / "steps.json"
    written.write_text(json.dumps(STEPS))
    done = [Part("tests_model", [], 1), Part("steps", [], 1, str(written))]
    rows = claims({"tests_model": "exit status 1", "steps": "not done in 130 s"}, done)
    found = {row.what: row for row in rows}
    assert [row.what for row in rows] == [row.what for row in CLAIMS]
    assert found["GPU tests of the model"].holds is False
    assert found["ViT-S, batch 64"].measured == "2,000"
    assert found["of matrix products"].holds is False  # 33 %
    assert found["against the plain step"].measured == "4.00 x"
    assert found["launches, eager"].holds is True
    assert found["host time of a graph"].measured == "6.00 ms"
    assert found["192 x 9, batch 256"].measured == TO_MEASURE
    assert found["end to end"].holds is None


def test_cases_cover_models_precisions_and_batches() -> None:
    cases = [case_of(name) for name in CASES]
    assert {(c.config.arch, c.precision, c.images) for c in cases} >= {
        (arch, precision, images)
        for arch in ("vit_s", "vit_b")
        for precision in ("fp16", "bf16")
        for images in (8, 64, 256)
    }
    small = case_of("small:fp16:256")
    assert small.config.backbone_shape() == (192, 9, 3)
    assert small.batch("cpu").local_crops.shape == (4, 256, 3, 16, 16)
    with pytest.raises(ValueError, match="expected a precision of fp32, bf16, fp16"):
        case_of("vit_s:fp8:64")


@pytest.mark.slow
def test_rehearsal_runs_every_part(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    for part in parts(tmp_path, rehearse=True):
        assert (tmp_path / f"{part.name}.txt").read_text(), part.name
        assert Path(part.json).is_file(), part.name
    table = done.stdout.partition("claims")[2]
    assert table.count(TO_MEASURE) >= len(CLAIMS)
    assert "residual + norm" in table  # the figures were read
    assert not {"holds", "short"} & set(table.split())
    assert "a rehearsal on the CPU" in table
