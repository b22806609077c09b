"""train.py as people run it: real files, real processes, real kills."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image
from small_runs import HOLD, SMALL, Process, Start, losses, records

from ibeton.pipeline.convert.converter import ConvertOptions, convert
from ibeton.train import main

PHOTOS = 96


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 photos of two classes: stripes that lie and stripes that stand."""
    root = tmp_path_factory.mktemp("stripes")
    rng = np.random.default_rng(0)
    for i in range(PHOTOS):
        folder = root / ("lying", "standing")[i % 2]
        folder.mkdir(exist_ok=True)
        period, ground = rng.uniform(6, 14), rng.integers(0, 128, 3)
        wave = np.sin(np.arange(48) * 2 * np.pi / period + rng.uniform(0, 6)) > 0
        pixels = np.where(wave[:, None, None], ground + 120, ground).astype(np.uint8)
        pixels = np.broadcast_to(pixels, (48, 48, 3))
        Image.fromarray(pixels if i % 2 == 0 else pixels.transpose(1, 0, 2)).save(
            folder / f"{i}.jpg"
        )
    return root


@pytest.fixture(scope="module")
def beton(photos: Path) -> Path:
    path = photos.parent / f"{photos.name}.beton"
    convert(photos, path, ConvertOptions(workers=1))
    return path


def finish(process: Process) -> str:
    """What the run says until its end."""
    assert process.wait() == 0, process.said()[-4000:]
    return process.said()


def evaluated(beton: Path, photos: Path) -> list[str]:
    """Options of a run of three epochs that evaluates after each."""
    options = ["--data", str(beton), "--save-steps", "5", "--resume", "auto", "--loader", "auto"]
    return [*options, "--eval-train", str(beton), "--eval-val", str(photos), "--eval-every", "1"]


def test_a_run_leaves_log_curves_and_checkpoint_and_one_that_is_killed_and_resumes_the_same(
    start: Start, beton: Path, photos: Path, tmp_path: Path
) -> None:
    options, unbroken, folder = evaluated(beton, photos), tmp_path / "unbroken", tmp_path / "killed"
    said = finish(start(unbroken, *options))
    assert [r[0] for r in losses(unbroken)] == list(range(36))
    scores = {r["step"]: r["knn_top1"] for r in records(unbroken) if "knn_top1" in r}
    assert list(scores) == [0, 12, 24, 36]
    assert f"untrained {scores[0]:.2f} %, now {scores[36]:.2f} %" in said
    assert "loader ffcv" in said or "loader pil" in said
    content = torch.load(unbroken / "checkpoint.pt", weights_only=True)
    assert content["step"] == 36
    assert content["epoch"] == 3
    assert {"student", "teacher", "ibot_loss", "optimizer", "rng", "config"} <= set(content)
    saved = json.loads((unbroken / "config.json").read_text())
    assert saved == json.loads(json.dumps(content["config"]))
    assert Image.open(unbroken / "curves.png").size[0] > 500
    assert list((unbroken / "tensorboard").iterdir())

    process = start(folder, *options, fault=HOLD.format(step=18))
    process.until(lambda: '"step": 17' in process.log())
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(losses(folder)) < 36
    said = finish(start(folder, *options))
    assert "resumed at step 15" in said
    assert losses(folder) == losses(unbroken)
    assert {r["step"]: r["knn_top1"] for r in records(folder) if "knn_top1" in r} == scores
    other = torch.load(folder / "checkpoint.pt", weights_only=True)["teacher"]
    assert all(torch.equal(content["teacher"][name], other[name]) for name in other)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "finished"


def test_bad_input_ends_the_process_with_status_2(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "--data", str(tmp_path / "missing.beton")]
    command += ["--output-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "missing.beton" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("", "--output-dir"),  # a run is there, and --resume was not given
        ("--resume auto --embed-dim 64", "--embed-dim 32 (now 64)"),
        ("--resume auto --arch vit_s", "--arch"),
        ("--resume auto --batch-size 16", "--batch-size"),
        ("--resume {tmp}/none.pt", "none.pt does not exist"),
        ("--resume {tmp}/empty.pt", "empty.pt is no checkpoint"),
        ("--data {tmp}/missing.beton", "missing.beton"),
        ("--data {tmp}/empty", "empty"),
        ("--data {tmp}/foreign.beton", "foreign.beton"),
        ("--data {tmp}/text.beton", "text.beton"),
        ("--data", "--data"),
        ("--arch vit_z", "--arch"),
        ("--global-crops-size 36", "--global-crops-size 36"),
        ("--local-crops-size 20", "--local-crops-size 20"),
        ("--batch-size 1000", "--batch-size 1000"),
        ("--epochs 0", "--epochs"),
        ("--precision fp16", "--precision fp16"),
        ("--cuda-graphs on", "--cuda-graphs on: they need a GPU"),
        ("--eval-every 1", "--eval-train"),
        ("--eval-every 1 --eval-train {tmp}/none --eval-val {tmp}/none", "none does not exist"),
        ("--eval-every 1 --eval-train {tmp}/empty --eval-val {tmp}/empty", "empty holds no photos"),
        ("--nonsense 3", "--nonsense"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    arguments: str,
    names: str,
    start: Start,
    finished: Path,
    beton: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not finished.exists():
        finish(start(finished, "--data", str(beton), "--stop-after", "2"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.pt").write_bytes(b"nothing")
    (tmp_path / "text.beton").write_text("no photos here\n" * 1000)
    whole = bytearray(beton.read_bytes())
    whole[24] = 200  # the type of the first field
    (tmp_path / "foreign.beton").write_bytes(whole)
    before = content_of(finished)
    given = [part.format(tmp=tmp_path) for part in arguments.split()]
    try:
        status = main([*SMALL, "--data", str(beton), "--output-dir", str(finished), *given])
    except SystemExit as stop:  # argparse's way
        status = int(stop.code or 0)
    assert status == 2
    assert names in capsys.readouterr().err.strip().splitlines()[-1]
    assert content_of(finished) == before, "bad input changed the run folder"
