"""Faults put into real runs: what the user sees, the exit status, and what is on disk."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_runs import PER_EPOCH, Start, losses, records

from ibeton.pipeline.loaders import LOADERS
from ibeton.training.checkpoints import listed
from ibeton.training.health.nonfinite_guard import IN_A_ROW
from ibeton.training.run_folder import read_run

STEPS = 3 * PER_EPOCH
NAN_IMAGE = """
from ibeton.pipeline.loader import Loader
finish = Loader._finish
def spoil(self, plan, crops):
    batch = finish(self, plan, crops)
    batch.global_crops[0, batch.indices == 7] = float("nan")
    return batch
Loader._finish = spoil
"""
# In this process, steps 10 to 13 meet a gradient that is no number, once.
BAD_GRADIENTS_ONCE = """
from ibeton import train
from ibeton.model import steps
clip, calls = steps.clip_gradients, []
def spoil(parameters, most):
    parameters = list(parameters)
    calls.append(1)
    if {first} < len(calls) <= {last}:
        parameters[5].grad.fill_(float("nan"))
    return clip(parameters, most)
steps.clip_gradients = spoil
"""
CUT_NEWEST = """
import os
from ibeton import train
roll_back = train.roll_back
def cut(run, log):
    os.truncate(run.folder / "checkpoint.pt", 1000)
    roll_back(run, log)
train.roll_back = cut
"""
# From step 10 on, whenever it is done, the gradient of one tensor is no number.
BAD_GRADIENTS = """
from ibeton import train
step = train.train_step
def spoil(run, *rest):
    if run.step == 10:
        weight = run.ibot.student.backbone.blocks[1].mlp.fc1.weight
        weight.register_hook(lambda gradient: gradient * float("nan"))
    return step(run, *rest)
train.train_step = spoil
"""
# A rollback counts as recent for few steps, as it is soon over in a long run.
SOON_FORGOTTEN = """
from ibeton.training.health import nonfinite_guard
nonfinite_guard.AGAIN_WITHIN = 1
"""
INF_LOSS = """
from ibeton.model.loss import IBOTLoss
forward, calls = IBOTLoss.forward, []
def spoil(self, *rest):
    terms, means = forward(self, *rest)
    calls.append(1)
    if len(calls) == 6:
        terms = terms | {"loss": terms["loss"] + float("inf")}
    return terms, means
IBOTLoss.forward = spoil
"""


DELETE = """
import os
from ibeton import train
step = train.train_step
def delete(run, *rest):
    if run.step == 0:
        os.remove({path!r})
    return step(run, *rest)
train.train_step = delete
"""


def test_an_image_that_is_no_number_costs_a_step_an_epoch_and_is_named(
    start: Start, tmp_path: Path
) -> None:
    process = start(tmp_path / "run", fault=NAN_IMAGE)
    assert process.wait() == 0, process.said()[-2000:]
    skipped = [r for r in records(tmp_path / "run") if "skipped" in r]
    assert [r["epoch"] for r in skipped] == [0, 1, 2]
    assert all(7 in r["indices"] and r["loss"] is None for r in skipped)
    assert process.said().count("is skipped: its loss is not finite") == 3
    assert records(tmp_path / "run")[-1]["skipped_steps"] == 3
    content = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert all(
        t.isfinite().all() for t in [*content["student"].values(), *content["ibot_loss"].values()]
    )


def test_one_infinite_loss_is_one_step_less(start: Start, tmp_path: Path) -> None:
    process = start(tmp_path / "run", "--stop-after", "8", fault=INF_LOSS)
    assert process.wait() == 0, process.said()[-2000:]
    assert [r["step"] for r in records(tmp_path / "run") if "skipped" in r] == [5]
    assert (
        "step 5 is skipped: its loss is not finite (1 skipped so far, 1 in a row)" in process.said()
    )


def test_a_passing_trouble_is_undone_by_going_back_to_the_last_checkpoint(
    start: Start, tmp_path: Path
) -> None:
    fault = BAD_GRADIENTS_ONCE.format(first=10, last=10 + IN_A_ROW)
    for name, put_in in (("sound", ""), ("passing", fault)):
        process = start(tmp_path / name, fault=put_in)
        assert process.wait() == 0, process.said()[-3000:]
    assert "rolling back from step 13 to step 8" in process.said()
    assert "the step is finite when repeated" in process.said()
    went_back = [r for r in records(tmp_path / "passing") if "went_back_from" in r]
    assert [(r["step"], r["went_back_from"]) for r in went_back] == [(8, 13)]
    assert losses(tmp_path / "passing") == losses(tmp_path / "sound")
    one, other = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["teacher"]
        for name in ("sound", "passing")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_rollback_names_a_damaged_checkpoint_that_it_skips(start: Start, tmp_path: Path) -> None:
    fault = BAD_GRADIENTS_ONCE.format(first=18, last=18 + IN_A_ROW)
    process = start(tmp_path / "run", fault=fault + CUT_NEWEST)
    assert process.wait() == 0, process.said()[-3000:]
    assert f"skipped: {tmp_path / 'run' / 'checkpoint.pt'}" in process.said()
    assert "rolling back from step 21 to step 8" in process.said()


def test_a_trouble_that_comes_again_ends_the_run_with_a_report(
    start: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start(folder, fault=BAD_GRADIENTS + SOON_FORGOTTEN)
    assert process.wait() == 1, process.said()[-2000:]
    assert "which recurred after a rollback" in process.said()
    assert "non-finite gradients, from the loss down: backbone.blocks.1.mlp.fc1.weight" in (
        process.said()
    )
    assert "Traceback" not in process.said()
    report = json.loads((folder / "trouble-rank0.json").read_text())
    assert report["gradients"] == ["backbone.blocks.1.mlp.fc1.weight"]
    assert len(report["alone"]) == 8, "each photo of the batch leads to it"
    assert report["layers"] == []
    assert read_run(folder)["state"].startswith("failed: non-finite values in step")
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert content["step"] == PER_EPOCH
    again = start(folder, "--resume", "auto", "--stop-after", "10")
    assert again.wait() == 0, "the checkpoint is sound"


@pytest.mark.parametrize("loader", ["dali", pytest.param("pil", marks=pytest.mark.slow)])
def test_a_photo_that_is_deleted_on_the_way_is_named_and_replaced(
    loader: str, start: Start, tmp_path: Path, tiny_folder: Path
) -> None:
    if missing := LOADERS[loader].problem():
        pytest.skip(missing)
    shutil.copytree(tiny_folder, tmp_path / "photos")
    lost = tmp_path / "photos" / "dark" / "4.jpg"
    process = start(
        *(tmp_path / "run", "--data", str(tmp_path / "photos"), "--loader", loader),
        *("--workers", "2"),
        fault=DELETE.format(path=str(lost)),
    )
    assert process.wait() == 0, process.said()[-2000:]
    assert "unreadable: dark/4.jpg" in process.said()
    assert process.said().count("dark/4.jpg: ") == 2, "as it is met, and at the end"
    assert records(tmp_path / "run")[-1]["unreadable"] == 1


@pytest.mark.parametrize(
    "loader", ["dali", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pil", "ffcv"))]
)
def test_a_data_file_that_is_deleted_on_the_way_lasts_as_long_as_the_run(
    loader: str, start: Start, tiny: Path, tmp_path: Path
) -> None:
    if missing := LOADERS[loader].problem():
        pytest.skip(missing)
    folder, data = tmp_path / "run", tmp_path / "photos.beton"
    shutil.copyfile(tiny, data)
    options = ("--data", str(data), "--loader", loader, "--resume", "auto")
    process = start(folder, *options, "--stop-after", "18", fault=DELETE.format(path=str(data)))
    assert process.wait() == 0, process.said()[-2000:]
    assert [r[0] for r in losses(folder)] == list(range(18)), "into its third epoch"
    assert records(folder)[-1]["unreadable"] == 0
    before = (folder / "checkpoint.pt").read_bytes()
    again = start(folder, *options)
    assert again.wait() == 2
    assert f"error: {data} does not exist" in again.said().strip().splitlines()[-1]
    assert (folder / "checkpoint.pt").read_bytes() == before
    shutil.copyfile(tiny, data)
    restored = start(folder, *options)
    assert restored.wait() == 0, restored.said()[-2000:]
    assert [r[0] for r in losses(folder)] == list(range(STEPS))


CUT = """
import os
from ibeton import train
step = train.train_step
def cut(run, *rest):
    if run.step == 0:
        os.truncate({path!r}, os.path.getsize({path!r}) // 3)
    return step(run, *rest)
train.train_step = cut
"""


@pytest.mark.parametrize(
    "loader", ["dali", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pil", "ffcv"))]
)
def test_a_data_file_that_is_cut_short_on_the_way_is_named(
    loader: str, start: Start, tiny: Path, tmp_path: Path
) -> None:
    if missing := LOADERS[loader].problem():
        pytest.skip(missing)
    data = tmp_path / "photos.beton"
    shutil.copyfile(tiny, data)
    options = ("--data", str(data), "--loader", loader, "--epochs", "9")
    process = start(tmp_path / "run", *options, fault=CUT.format(path=str(data)))
    assert process.wait() == 1, process.said()[-3000:]
    assert "Traceback" not in process.said(), process.said()[-3000:]
    assert f"error: {data} ends at byte " in process.said()
    assert "it was cut short or replaced while in use" in process.said()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk needs root, and the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


FILL = """
from ibeton.training import checkpoints
write, calls = checkpoints.write, []
def fill(folder, *rest):
    calls.append(1)
    if len(calls) == 2:
        free = os.statvfs(folder)
        size = free.f_bavail * free.f_frsize - {left}
        (folder.parent / "filler").write_bytes(bytes(size))
    write(folder, *rest)
checkpoints.write = fill
"""


@pytest.mark.parametrize("left", [200_000, 0])
def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(
    left: int, start: Start, small_disk: Path, tmp_path: Path
) -> None:
    folder = small_disk / "run"
    options = ("--keep-last", "1", "--keep-every", "0", "--resume", "auto")
    process = start(folder, *options, fault=FILL.format(left=left))
    assert process.wait() == 1, process.said()[-2000:]
    assert "no checkpoint could be written at step 16" in process.said()
    assert "No space left on device" in process.said()
    assert "Traceback" not in process.said()
    assert listed(folder) == [folder / "checkpoint.pt"]
    assert not list(folder.glob(".checkpoint*"))
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == PER_EPOCH
    (small_disk / "filler").unlink()
    again = start(folder, *options)
    assert again.wait() == 0, again.said()[-2000:]
    assert [r[0] for r in losses(folder)] == list(range(STEPS))
