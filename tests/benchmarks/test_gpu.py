"""benchmarks/gpu.py without a GPU: its table of claims, and that each part runs."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from paths import ROOT
from rich.console import Console

from ibeton.benchmarks import graph
from ibeton.benchmarks.gpu import CLAIMS, TO_MEASURE, Part, claims, end_session, parts, run
from ibeton.benchmarks.graph import CASES, case_of
from ibeton.benchmarks.harness.model_step import now

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


def test_figures_of_an_earlier_call_do_not_count(tmp_path: Path) -> None:
    old = tmp_path / "steps.json"
    old.write_text(json.dumps(STEPS))
    part = Part("steps", ["-c", "raise SystemExit(3)"], 60, str(old))
    problem = run(part, tmp_path, 60, Console(quiet=True))
    assert problem == "exit status 3"
    assert claims({"steps": problem}, [part]) == CLAIMS


def runs(process: int) -> bool:
    """Whether it runs, and is not only waiting for its parent to notice its end."""
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False


def test_a_part_out_of_time_ends_with_its_children(tmp_path: Path) -> None:
    child = f"""
import os, pathlib, time
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(os.getpid()))
time.sleep(600)"""
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], start_new_session=True)
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        time.sleep(0.1)
    end_session(process)
    process.wait()
    while runs(int((tmp_path / "child").read_text())):  # it takes a moment to die
        time.sleep(0.1)
    late = Part("steps", ["-c", "import time; time.sleep(3600)"], 1)
    assert run(late, tmp_path, 1, Console(quiet=True)) == "not done in 1 s"


def test_a_case_without_memory_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def step_of(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")

    monkeypatch.setattr(graph, "step_of", step_of)
    found = graph.compare(case_of("tiny:fp32:1"), "cpu", ("eager", "graph"))
    problem = {"problem": "CUDA out of memory."}
    assert found == {"images": 1, "eager": problem, "graph": problem}
    graph.show("tiny:fp32:1", found, ("eager", "graph"), Console(quiet=True))


def test_a_case_that_is_skipped_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "graph --cases tiny:fp32:1 --device cpu --seconds 0"
    monkeypatch.setattr("sys.argv", line.split())
    graph.main()
    assert "tiny:fp32:1: skipped, 0 s are over" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["graph", "--cases", "tiny:bf16:1", "--device", "cpu"])
    monkeypatch.setattr(graph, "on_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    graph.main()
    assert "tiny:bf16:1: skipped, this GPU does not support bf16" in capsys.readouterr().out


def test_the_second_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    now("cuda:1")
    now("cpu")
    assert waited == ["cuda:1"]


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
