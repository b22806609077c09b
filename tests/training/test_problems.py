"""What a user can cause ends in a sentence and a status, never in a traceback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from small_runs import Start

from ibeton.training import runs

DELETE_FOLDER = """
import shutil
from ibeton import train
step = train.train_step
def delete(run, *rest):
    if run.step == 3:  # moved first: TensorBoard's thread writes files while a tree is deleted
        shutil.rmtree(run.folder.rename(run.folder.with_name("moved")), ignore_errors=True)
    return step(run, *rest)
train.train_step = delete
"""
LONG_TMPDIR = """
import os, tempfile
tempfile.tempdir = {folder!r}
"""
SLOW_GIT = """
import os
from ibeton.training import run_folder
run_folder._GIT_S = 0.2
os.environ["PATH"] = {folder!r} + ":" + os.environ["PATH"]
"""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--device", "tpu"], "--device tpu: expected cpu, cuda, cuda:N or auto"),
        (["--device", "mps"], "--device mps: expected cpu, cuda"),
        (["--output-dir", "{tmp}/file"], "is a file"),
        (["--output-dir", "{tmp}/file/run"], "is a file"),
        (["--output-dir", "/proc/run"], "/proc"),
        (["--data", "{tmp}/broken"], "no photo in it can be read"),
        (["--data", "{tmp}/broken", "--loader", "pil"], "no photo in it can be read"),
        (["--loader", "pil"], "is too long for the sockets of worker processes"),
        (["--lr", "nan"], "nan"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    options: list[str], says: str, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "broken").mkdir()
    for i in range(12):
        (tmp_path / "broken" / f"{i}.jpg").write_bytes(b"no photo")
    long = tmp_path / ("x" * 90)
    long.mkdir()
    fault = LONG_TMPDIR.format(folder=str(long)) if options == ["--loader", "pil"] else ""
    process = start(tmp_path / "run", *[o.format(tmp=tmp_path) for o in options], fault=fault)
    assert process.wait() == 2, process.said()[-3000:]
    last = process.said().strip().splitlines()[-1]
    assert last.startswith("error: "), process.said()[-3000:]
    assert says in last
    assert "Traceback" not in process.said()
    assert not (tmp_path / "run").exists()


def test_a_deleted_run_folder_ends_the_run_with_a_sentence(start: Start, tmp_path: Path) -> None:
    process = start(tmp_path / "run", fault=DELETE_FOLDER)
    assert process.wait() == 1, process.said()[-3000:]
    assert "Traceback" not in process.said(), process.said()[-3000:]
    assert "error: " in process.said()
    assert "No such file or directory" in process.said()
    assert f"there is no checkpoint in {tmp_path / 'run'}" in process.said()


def test_another_optimizer_is_refused_on_resume(start: Start, tmp_path: Path) -> None:
    assert start(tmp_path / "run", "--stop-after", "1").wait() == 0
    process = start(tmp_path / "run", "--resume", "auto", "--optimizer", "sgd")
    assert process.wait() == 2, process.said()[-3000:]
    assert "was written with --optimizer adamw, this run has sgd" in process.said()
    assert "Traceback" not in process.said()


def test_paths_that_look_like_markup_and_a_git_that_hangs_do_no_harm(
    start: Start, tmp_path: Path, tiny: Path
) -> None:
    data = tmp_path / "[red]photos[" / "[final]"
    data.mkdir(parents=True)
    shutil.copyfile(tiny, data / "[bold]x.beton")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text("#!/bin/sh\nexec sleep 1000\n")
    (tmp_path / "bin" / "git").chmod(0o755)
    folder = tmp_path / "run [" / "final]"
    options = ("--data", str(data / "[bold]x.beton"), "--output-dir", str(folder))
    fault = SLOW_GIT.format(folder=str(tmp_path / "bin"))
    process = start(folder, *options, "--stop-after", "1", fault=fault)
    assert process.wait() == 0, process.said()[-3000:]
    assert str(folder / "checkpoint.pt") in process.said()
    run = json.loads((folder / "run.json").read_text())
    assert run["starts"][0]["code"] == {"commit": "unknown", "changed": "unknown"}


def test_nowhere_to_keep_compiled_code_is_a_line(tmp_path: Path) -> None:
    env = {**os.environ, "NUMBA_CACHE_DIR": "/proc/none", "XDG_CACHE_HOME": "/proc/none"}
    code = "from ibeton.pipeline import compiled; import numba; print(numba.config.CACHE_DIR)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        **{"capture_output": True, "text": True, "check": False},
        env={**env, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    assert done.stderr.count("\n") == 1
    assert "set NUMBA_CACHE_DIR" in done.stderr


def test_a_damaged_run_does_not_hide_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "export").mkdir()  # of a backbone, for Hugging Face: no run
    (tmp_path / "export" / "config.json").write_text("{}")
    for name, text in (("good", '{"state": "finished"}'), ("bad", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"arch": "vit_s", "epochs": 3}')
        (tmp_path / name / "run.json").write_text(text)
    assert runs.main([str(tmp_path)]) == 0
    _, bad, good, why = capsys.readouterr().out.splitlines()
    assert good.split() == ["good", "vit_s", "-/3", "-", "-", "-", "finished", "-"]
    assert bad.split() == ["bad", *"-----", "unreadable", "-"]
    assert why.startswith(f"unreadable: {tmp_path / 'bad' / 'run.json'} is damaged")
