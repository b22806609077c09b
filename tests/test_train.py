"""train.py as people run it: real files, real processes, real kills."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image

from ibeton.pipeline.convert.converter import ConvertOptions, convert
from ibeton.train import main

PHOTOS = 96
# A run of 12 steps an epoch that takes seconds.
SMALL = shlex.split(
    "--arch vit_t --embed-dim 32 --depth 2 --num-heads 2 --patch-size 8 --image-size 32"
    " --global-crops-size 32 --local-crops-size 16 --local-crops-number 2 --batch-size 8"
    " --out-dim 64 --hidden-dim 32 --bottleneck-dim 16 --warmup-epochs 1 --epochs 3"
    " --warmup-teacher-temp-epochs 1 --log-steps 1 --lr 4e-3 --workers 1 --device cpu"
)


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


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def train(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *SMALL, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=300, check=False
    )


def trained(*arguments: str, launcher: tuple[str, ...] = ()) -> str:
    done = train(*arguments, launcher=launcher)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[float, ...]]:
    names = ("step", "loss", "cls", "patch", "grad_norm", "lr", "momentum")
    return [tuple(r[name] for name in names) for r in records(folder) if "loss" in r]


def test_a_run_leaves_log_curves_checkpoint_and_a_k_nn_margin(
    beton: Path, photos: Path, tmp_path: Path
) -> None:
    evaluation = ["--eval-train", str(beton), "--eval-val", str(photos), "--eval-every", "2"]
    said = trained("--data", str(beton), "--output-dir", str(tmp_path / "run"), *evaluation)
    folder = tmp_path / "run"
    assert [r[0] for r in losses(folder)] == list(range(36))
    scores = {r["step"]: r["knn_top1"] for r in records(folder) if "knn_top1" in r}
    assert list(scores) == [0, 24, 36]
    assert f"untrained {scores[0]:.2f} %, now {scores[36]:.2f} %" in said
    assert "loader ffcv" in said or "loader pil" in said
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert content["step"] == 36
    assert content["epoch"] == 3
    assert {"student", "teacher", "ibot_loss", "optimizer", "rng", "config"} <= set(content)
    saved = json.loads((folder / "config.json").read_text())
    assert saved == json.loads(json.dumps(content["config"]))
    assert Image.open(folder / "curves.png").size[0] > 500
    assert list((folder / "tensorboard").iterdir())


def test_two_processes_with_half_the_batch_are_one_with_all(beton: Path, tmp_path: Path) -> None:
    common = ["--data", str(beton), "--drop-path", "0", "--stop-after", "3"]
    trained(*common, "--batch-size", "16", "--output-dir", str(tmp_path / "one"))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    trained(*common, "--output-dir", str(tmp_path / "two"), launcher=torchrun)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 3
    np.testing.assert_allclose(np.array(one)[:, :4], np.array(two)[:, :4], rtol=1e-5)
    assert len({r[1] for r in one}) == 3, "the loss stood still: nothing was compared"
    states = [
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["ibot_loss"]
        for name in ("one", "two")
    ]
    for name, center in states[0].items():
        assert center.abs().max() > 0
        torch.testing.assert_close(states[1][name], center, rtol=1e-5, atol=1e-7)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_killed_run_that_resumes_ends_as_an_unbroken_one(
    beton: Path, photos: Path, tmp_path: Path
) -> None:
    common = ["--data", str(beton), "--save-steps", "5", "--resume", "auto", "--drop-path", "0.2"]
    common += ["--eval-train", str(beton), "--eval-val", str(photos), "--eval-every", "1"]
    trained(*common, "--output-dir", str(tmp_path / "unbroken"))
    folder = tmp_path / "killed"
    command = [*SMALL, *common, "--output-dir", str(folder)]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *command],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    log = folder / "log.jsonl"
    wait_for(lambda: log.exists() and '"step": 17' in log.read_text(), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = len(losses(folder))
    assert before < 36
    said = trained(*common, "--output-dir", str(folder))
    assert "resumed at step 15" in said or "resumed at step 20" in said
    assert losses(folder) == losses(tmp_path / "unbroken")
    scores = [
        [(r["step"], r["knn_top1"]) for r in records(tmp_path / name) if "knn_top1" in r]
        for name in ("unbroken", "killed")
    ]
    assert scores[0] == scores[1]
    assert [step for step, _ in scores[0]] == [0, 12, 24, 36]
    one, other = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["teacher"]
        for name in ("unbroken", "killed")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    trained("--data", str(beton), "--stop-after", "2", "--output-dir", str(folder))
    return folder


def test_bad_input_ends_the_process_with_status_2(tmp_path: Path) -> None:
    done = train("--data", str(tmp_path / "missing.beton"), "--output-dir", str(tmp_path / "run"))
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
    finished: Path,
    beton: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
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
