"""Real runs with a fault put in that cannot be missed: the log and the advice name it.

The clock of the first is the test's own; in the others, marked slow, each delay is many times the
step.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import ROOT
from PIL import Image
from small_runs import SMALL_MODEL, SMALL_RUN, Ticks, noise_beton, records, with_a_slow_rank
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ibeton import stages, train
from ibeton.model import IBOT
from ibeton.pipeline.loaders import LOADERS
from ibeton.training.timing.speed import slowest

SMALL = [*SMALL_MODEL, *SMALL_RUN, "--batch-size", "4", "--drop-path", "0.1"]


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_beton(tmp_path_factory.mktemp("noise"), 96)


def run(beton: Path, folder: Path, *options: str) -> dict[str, Any]:
    """The last record of a run."""
    assert train.main([*SMALL, "--data", str(beton), "--output-dir", str(folder), *options]) == 0
    return records(folder)[-1]


def named_in_trace(folder: Path) -> set[str]:
    """Names that a profiler was told of."""
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    return {event["name"] for event in events if event.get("cat") == "user_annotation"}


def scalars(folder: Path) -> dict[str, float]:
    """What TensorBoard shows last."""
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {name: board.Scalars(name)[-1].value for name in board.Tags()["scalars"]}


def test_a_slow_stage_of_the_model_stands_in_the_log_the_board_and_the_trace(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks, update = Ticks(), IBOT.update_teacher

    def slow(*arguments: Any) -> None:
        ticks.now += 1.0
        update(*arguments)

    monkeypatch.setattr(IBOT, "update_teacher", slow)
    monkeypatch.setattr(stages, "time", ticks)
    options = ["--loader", "pil", "--stop-after", "4", "--log-steps", "100", "--profile", "1"]
    record = run(beton, tmp_path / "run", *options)
    ms = record["stage_ms"]
    assert max(ms, key=lambda name: ms[name]) == "ema"
    assert ms["ema"] == pytest.approx(1000, rel=1e-3)
    step = 4 / record["images_per_s"] * 1000
    assert sum(ms.values()) == pytest.approx(step, rel=1e-3), "the parts are the step"
    assert {"teacher", "student", "loss", "backward", "optimizer", "copy", "mask"} <= set(ms)
    assert 0 < record["peak_share"] < 1
    assert record["memory_gib"] > 0.1
    assert set(record["loader_ms"]) == {"read", "decode", "crop"}
    assert set(ms) | {"wait"} <= named_in_trace(tmp_path / "run") | {"other"}
    board = scalars(tmp_path / "run")
    assert board["stage_ms/ema"] == pytest.approx(ms["ema"])
    assert {f"stage_ms/{name}" for name in ms} | {"loader_ms/decode", "data_wait"} <= set(board)


@pytest.mark.slow
def test_a_loader_that_sleeps_between_batches_is_found(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ibeton.pipeline.loaders.pil import PilCrops

    batches = PilCrops.stream

    def slow(*arguments: Any) -> Iterator[Any]:
        for crops in batches(*arguments):
            time.sleep(0.5)
            yield crops

    monkeypatch.setattr(PilCrops, "stream", slow)
    record = run(beton, tmp_path / "run", "--loader", "pil", "--stop-after", "22")
    assert record["data_wait"] > 0.5
    assert "no stage of the loader limits" in capsys.readouterr().out


SLOW_PREAD = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
ssize_t pread(int file, void *to, size_t size, off_t at) {
    ssize_t (*real)(int, void *, size_t, off_t) = dlsym(RTLD_NEXT, "pread");
    usleep(100000);
    return real(file, to, size, at);
}
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(LOADERS["ffcv"].problem()), reason="libturbojpeg is not installed")
@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_a_slow_disk_is_found(beton: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.c").write_text(SLOW_PREAD)
    slow = str(tmp_path / "slow.so")
    build = ["cc", "-shared", "-fPIC", "-o", slow, str(tmp_path / "slow.c"), "-ldl"]
    subprocess.run(build, check=True)
    options = ["--loader", "ffcv", "--stop-after", "22", "--output-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "train.py", *SMALL, "--data", str(beton), *options],
        env={**os.environ, "LD_PRELOAD": slow},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = records(tmp_path / "run")[-1]
    assert record["loader_ms"]["read"] >= 100
    assert record["loader_ceiling"] <= 10, "images/s of one worker"
    assert "read limits" in done.stdout
    assert "page cache" in done.stdout


@pytest.fixture(scope="module")
def large_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 photos whose decode takes longer than a step of the model."""
    root = tmp_path_factory.mktemp("large")
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "0.jpg", quality=90)
    for i in range(1, 16):
        shutil.copyfile(root / "0.jpg", root / f"{i}.jpg")
    return root


@pytest.mark.slow
def test_one_worker_where_there_could_be_two_is_found(
    large_photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(train, "cores", lambda: 2)
    record = run(large_photos, tmp_path / "run", "--loader", "pil", "--epochs", "6")
    loader_ms = record["loader_ms"]
    assert max(loader_ms, key=lambda name: loader_ms[name]) == "decode"
    said = " ".join(capsys.readouterr().out.split())
    assert "decode limits" in said
    assert "per photo on each of 1 worker, busy" in said
    assert "Give --workers 2, as many as there are cores" in said


@pytest.mark.slow
def test_the_slowest_of_two_processes_is_named_and_comm_stands_apart(
    beton: Path, tmp_path: Path
) -> None:
    options = ["--loader", "pil", "--stop-after", "5", "--log-steps", "4"]
    options += ["--data", str(beton), "--output-dir", str(tmp_path / "run")]
    done = with_a_slow_rank("ibeton.train", tmp_path, *SMALL, *options)
    first, second = records(tmp_path / "run")[-1]["ranks"]
    assert second["ema"] >= 1000
    assert first["ema"] < 500
    assert first["comm"] > 500, "it waits for the other, and not in a stage of its own"
    assert second["comm"] < 500
    assert "rank 1 is the slowest" in done.stdout
    # Its first line may be about the first steps, in which other things are slow.
    rank, _, stage, _ = slowest([first, second])
    assert (rank, stage) == (1, "ema")
