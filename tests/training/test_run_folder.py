"""A folder belongs to one run, and one process at a time writes to it."""

import fcntl
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from small_runs import PER_EPOCH, Start, losses

from ibeton.atomic import replacing
from ibeton.training import run_folder, runs
from ibeton.training.run_folder import RunFolder, is_held, read_run


def test_a_folder_is_held_by_one_process_and_belongs_to_one_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", "a", "", {"epochs": 3}, {"step": 0})
    assert is_held(tmp_path / "run")
    with pytest.raises(ValueError, match="in use by another process"):
        RunFolder(tmp_path / "run", "a", "a", {}, {})
    folder.close("stopped")
    assert not is_held(tmp_path / "run")
    with pytest.raises(ValueError, match="in use"):  # begun by another since it was looked at
        RunFolder(tmp_path / "run", "b", "", {}, {})
    RunFolder(tmp_path / "run", "a", "a", {"epochs": 3}, {"step": 7}).close("finished")
    run = read_run(tmp_path / "run")
    assert run["id"] == "a"
    assert [start["step"] for start in run["starts"]] == [0, 7]
    assert run["starts"][0]["versions"]["torch"] == torch.__version__.split("+")[0]


def test_what_a_kill_left_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".hf.0123abcd.partial").mkdir()  # an export that is under way
    (tmp_path / ".export.pth.0123abcd.partial").touch()
    for name in ("best.pt", "log.jsonl", "backbone0001.safetensors"):
        with replacing(tmp_path / name) as partial:
            pass
        partial.touch()  # as after a kill
    with replacing(tmp_path / "curves.png", ".png") as partial:
        pass
    partial.touch()
    (tmp_path / ".mine.partial").touch()
    RunFolder(tmp_path, "a", "", {}, {}).close("finished")
    left = sorted(path.name for path in tmp_path.glob(".*.partial*"))
    assert left == [".export.pth.0123abcd.partial", ".hf.0123abcd.partial", ".mine.partial"]


def test_a_run_starts_while_another_program_looks_at_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "_LOCK_S", 3600.0)  # on a busy machine the timer is late
    with open(tmp_path / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        timer = threading.Timer(0.2, fcntl.flock, (lock, fcntl.LOCK_UN))
        timer.start()
        RunFolder(tmp_path, "a", "", {}, {}).close("finished")
        timer.join()


def test_the_note_of_the_code_leaves_the_git_index_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    file, index = tmp_path / "code.py", tmp_path / ".git" / "index"
    file.write_text("pass")
    for words in ("init -q", "add code.py", "-c user.name=a -c user.email=a@b commit -qm first"):
        subprocess.run(["git", "-C", str(tmp_path), *words.split()], check=True)
    os.utime(file, (1, 1))  # `git status` would note that in the index, and lock it to do so
    before = index.read_bytes()
    monkeypatch.setattr(run_folder, "_CODE", tmp_path)
    assert run_folder._git("status", "--porcelain") == ""
    assert index.read_bytes() == before


def test_two_runs_do_not_mix(start: Start, tmp_path: Path, tiny: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        assert start(folder, "--stop-after", "2").wait() == 0

    def refused(folder: Path, *options: str) -> str:
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        process = start(folder, *options)
        assert process.wait() == 2, process.said()[-2000:]
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
        return process.said().strip().splitlines()[-1]

    assert "already holds a run" in refused(one)
    assert "of another run" in refused(one, "--resume", str(two / "checkpoint.pt"))
    assert "has --seed 0" in refused(one, "--resume", "auto", "--seed", "1")
    for path in [*one.glob("checkpoint*"), *two.glob("checkpoint-*")]:
        path.unlink()
    begun = refused(one, "--resume", "auto", "--lr", "1e-3")
    assert "without a checkpoint yet (--lr 0.004 is now 0.001)" in begun
    weights = torch.load(two / "checkpoint.pt", weights_only=True)
    torch.save({n: weights[n] for n in ("teacher", "config")}, tmp_path / "weights.pt")
    assert "--init-from" in refused(two, "--resume", str(tmp_path / "weights.pt"))


def test_a_run_starts_from_weights(start: Start, tmp_path: Path) -> None:
    assert start(tmp_path / "one", "--stop-after", "2").wait() == 0
    process = start(
        tmp_path / "two",
        "--init-from",
        str(tmp_path / "one" / "checkpoint.pt"),
        "--stop-after",
        "1",
    )
    assert process.wait() == 0, process.said()[-2000:]
    assert "student and teacher start from" in process.said()
    assert losses(tmp_path / "two")[0] != losses(tmp_path / "one")[0]


def test_weights_that_fit_in_part_are_refused_by_name(start: Start, tmp_path: Path) -> None:
    assert start(tmp_path / "one", "--stop-after", "1").wait() == 0
    content = torch.load(tmp_path / "one" / "checkpoint.pt", weights_only=True)
    lost = content["teacher"].pop("backbone.blocks.1.norm2.weight")
    content["teacher"]["backbone.blocks.2.norm2.weight"] = lost
    torch.save(content, tmp_path / "part.pt")
    process = start(tmp_path / "two", "--init-from", str(tmp_path / "part.pt"))
    assert process.wait() == 2, process.said()[-2000:]
    message = process.said().strip().splitlines()[-1]
    assert "missing: blocks.1.norm2.weight" in message
    assert "blocks.2.norm2.weight" in message.split("missing:")[1].split(":", 1)[1]
    assert not (tmp_path / "two").exists()


def test_runs_are_listed_with_their_state(
    start: Start, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = ["--eval-train", str(tiny), "--eval-val", str(tiny), "--eval-every", "1"]
    assert start(tmp_path / "whole", "--epochs", "1", *evaluation).wait() == 0
    assert runs.main([str(tmp_path)]) == 0
    heads, line = capsys.readouterr().out.splitlines()
    assert heads.split()[:4] == ["run", "arch", "epochs", "loss"]
    name, arch, epochs, loss, knn, rate, state, *_ = line.split()
    assert (name, arch, epochs, state) == ("whole", "vit_t", "1.0/1", "finished")
    assert float(loss) == pytest.approx(losses(tmp_path / "whole")[PER_EPOCH - 1][1], abs=1e-3)
    assert 0 <= float(knn) <= 100
    assert float(rate) > 0
    assert runs.main([str(tmp_path / "whole" / "tensorboard")]) == 2
    assert "holds no runs" in capsys.readouterr().err


def test_the_age_of_a_run_does_not_depend_on_the_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(time.time() - 3 * 3600))
    try:
        for zone in ("UTC", "Asia/Tokyo", "America/New_York"):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            assert runs._ago(began) == "3 h"
    finally:
        monkeypatch.undo()
        time.tzset()
