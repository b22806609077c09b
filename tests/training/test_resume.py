"""A run that was killed, and went on, ends as one that was not: bit for bit."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from small_runs import HOLD, PER_EPOCH, Process, Start, losses, records

STEPS = 3 * PER_EPOCH


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, the optimizer's too."""
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert content["step"] == STEPS
    networks = ("student", "teacher", "ibot_loss")
    found = {f"{n}.{k}": v for n in networks for k, v in content[n].items()}
    for i, state in content["optimizer"]["state"].items():
        found |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    return found


def assert_equal_runs(folder: Path, unbroken: Path) -> None:
    assert losses(folder) == losses(unbroken)
    assert [r[0] for r in losses(folder)] == list(range(STEPS))
    one, other = weights(folder), weights(unbroken)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list(folder.glob(".*.partial")), "a write that was killed is left behind"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unbroken") / "run"


def finish(process: Process) -> None:
    assert process.wait() == 0, process.said()[-3000:]


def kill_after(process: Process, step: int, delay: float) -> None:
    """kill -9, `delay` seconds after the log has shown `step`, and of its workers too."""
    process.until(lambda: f'"step": {step},' in process.log())
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments_leave_no_trace(
    kills: int, start: Start, tmp_path: Path, unbroken: Path
) -> None:
    options = ("--save-steps", "2", "--resume", "auto")
    if not unbroken.exists():
        finish(start(unbroken, *options))
    folder, draws = tmp_path / "killed", random.Random(0)
    for i in range(kills):
        process = start(folder, *options, fault=HOLD.format(step=STEPS - 2))
        # Each time a little further, at any moment of the steps and writes there.
        step = min(STEPS - 3, (i + 1) * STEPS // (kills + 2))
        kill_after(process, step, draws.uniform(0, 0.05))
        assert process.status == -signal.SIGKILL
    finish(start(folder, *options, "--workers", "2"))
    assert_equal_runs(folder, unbroken)


KILL_IN_WRITE = """
import os, signal
from ibeton.model.checkpoint import files
from ibeton.training import checkpoints
def deadly(act):
    def die(source, target):
        if str(target).endswith({name!r}) and {moment!r} == "before":
            os.killpg(0, signal.SIGKILL)
        act(source, target)
        if str(target).endswith({name!r}):
            os.killpg(0, signal.SIGKILL)
    return die
os.replace, os.link = deadly(os.replace), deadly(os.link)
"""


def test_kills_between_the_renames_of_a_checkpoint_lose_nothing(
    start: Start, tmp_path: Path, unbroken: Path
) -> None:
    options = ("--save-steps", "5", "--resume", "auto")
    if not unbroken.exists():
        finish(start(unbroken, *options))
    folder = tmp_path / "killed"
    finish(start(folder, *options, "--stop-after", "6"))
    for name, moment in (
        ("/checkpoint.pt", "before"),
        ("/checkpoint.pt", "after"),
        ("/checkpoint-1.pt", "before"),
        ("/checkpoint-1.pt", "after"),
    ):
        process = start(folder, *options, fault=KILL_IN_WRITE.format(name=name, moment=moment))
        assert process.wait() == -signal.SIGKILL, process.said()[-2000:]
    finish(start(folder, *options))
    assert_equal_runs(folder, unbroken)


def test_a_damaged_newest_checkpoint_is_passed_over(
    start: Start, tmp_path: Path, unbroken: Path
) -> None:
    options = ("--save-steps", "5", "--resume", "auto")
    if not unbroken.exists():
        finish(start(unbroken, *options))
    folder = tmp_path / "damaged"
    finish(start(folder, *options, "--stop-after", "10"))
    newest = folder / "checkpoint.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.unlink()  # it may be a link
    newest.write_bytes(content)
    process = start(folder, *options)
    finish(process)
    assert "skipped: " in process.said()
    assert "fails its checksum" in process.said()
    assert f"resumed at step 8 (epoch 1) from {folder / 'checkpoint-1.pt'}" in process.said()
    assert_equal_runs(folder, unbroken)
    assert [r["step"] for r in records(folder)] == list(range(STEPS))
