"""A run that diverges never costs the last good checkpoint, and does not end with status 0."""

import errno
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Start, losses

from ibeton.training import checkpoints
from ibeton.training.health.nonfinite_guard import (
    AGAIN_WITHIN,
    IN_A_ROW,
    RECOVERED,
    NonFiniteGuard,
)

NAN = float("nan")
NAN_DATA = """
from ibeton.pipeline.loader import Loader
epoch_of = Loader.epoch
def spoil(self, epoch, first_step=0):
    for i, batch in enumerate(epoch_of(self, epoch, first_step)):
        if epoch * self.steps_per_epoch + first_step + i >= {step}:
            batch.global_crops.fill_(float("nan"))
        yield batch
Loader.epoch = spoil
"""
NAN_STATE = """
from ibeton import train
step = train.train_step
def spoil(run, *rest):
    if run.step == {step}:
        network = run.ibot.{network}
        parameter = list(network.parameters())[{number}]
        if {optimizer}:
            parameter = list(run.optimizer.state.values())[{number}]["exp_avg"]
        parameter.data.view(-1)[0] = float("nan")
    return step(run, *rest)
train.train_step = spoil
"""


def finite(path: Path) -> bool:
    return not list(checkpoints.not_finite(torch.load(path, weights_only=True)))


def diverge(start: Start, folder: Path, seed: int, kind: str, batch: int, every_step: bool) -> None:
    """A good run, the same with a fault from some step on, and the good run again."""
    draws = random.Random(seed)
    options = ["--resume", "auto", "--batch-size", str(batch), "--lr", "1e-3"]
    per_epoch = 64 // batch
    options += ["--epochs", str(60 // per_epoch), *(["--save-steps", "1"] if every_step else [])]
    good = draws.randint(per_epoch + 1, 14)
    begun = start(folder, *options, "--stop-after", str(good))
    assert begun.wait() == 0, begun.said()[-2000:]
    fault, more, last_good = "", [], good
    if kind == "rate":
        more = ["--lr", f"{10 ** draws.uniform(3.7, 6):.3g}"]
    else:
        step = good + draws.randint(0, 6)
        last_good = max(good, step if every_step else step // per_epoch * per_epoch)
        network, number = draws.choice(("student", "teacher")), draws.randrange(20)
        optimizer = draws.random() < 0.3
        fault = NAN_DATA if kind == "data" else NAN_STATE
        fault = fault.format(step=step, network=network, number=number, optimizer=optimizer)
    process = start(folder, *options, *more, fault=fault)
    said = f"{kind} {batch} {more} {fault}\n{process.wait()}\n{process.said()[-3000:]}"
    assert process.status == 1, said
    assert "Traceback" not in process.said(), said
    assert all(finite(path) for path in checkpoints.listed(folder)), said
    found = checkpoints.newest(folder)
    assert found[0] is not None
    assert found[1]["step"] >= last_good, said
    if kind == "rate":
        assert found[1]["step"] == good, said
    assert f"{found[0]} (step {found[1]['step']}) is sound" in process.said(), said
    assert "photos that cause it on their own" not in process.said(), said
    if kind == "data":
        assert "non-finite pixels: photo" in process.said(), said
    more = ["--stop-after", str(found[1]["step"] + 3)]
    again = start(folder, *options, *more)
    assert again.wait() == 0, again.said()[-2000:]
    assert all(record[1] is not None and record[1] < 20 for record in losses(folder)[-3:])


@pytest.mark.parametrize(
    ("kind", "batch", "every_step", "seed"),
    [
        ("rate", 64, False, 0),
        pytest.param("rate", 12, True, 0, marks=pytest.mark.slow),
        ("data", 12, False, 0),
        pytest.param("data", 12, False, 15, marks=pytest.mark.slow),  # from its first step on
        ("state", 64, True, 0),
        # An optimizer's state, which older checkpoints meet again.
        pytest.param("state", 12, False, 18, marks=pytest.mark.slow),
    ],
)
def test_a_diverging_run_keeps_its_last_good_checkpoint(
    kind: str, batch: int, every_step: bool, seed: int, start: Start, tmp_path: Path
) -> None:
    diverge(start, tmp_path / "run", seed, kind, batch, every_step)


@pytest.mark.slow
@pytest.mark.timeout(0)  # minutes alone, hours beside other work
def test_so_it_is_in_20_random_trials(start: Start, tmp_path: Path) -> None:
    draws = random.Random(1)
    for seed in range(20):
        kind, batch = draws.choice(("rate", "data", "state")), draws.choice((64, 12))
        diverge(start, tmp_path / f"run{seed}", seed, kind, batch, draws.random() < 0.5)


def judged(guard: NonFiniteGuard, step: int, loss: float, grad_norm: float = 1.0) -> None:
    guard.update({"step": step, "loss": loss, "grad_norm": grad_norm})


def test_only_checkpoints_from_which_a_good_step_was_made_are_returned_to() -> None:
    guard = NonFiniteGuard(scaled=False, uniform=8.0)
    guard.restore({}, 20)
    judged(guard, 20, 6.0)
    for step, loss in ((21, 500.0), (22, 7.0)):  # absurd, then dead: no gradient at all
        judged(guard, step, loss, grad_norm=0.0)
    assert not guard.in_streak
    for step in range(23, 23 + IN_A_ROW):
        judged(guard, step, NAN)
        assert guard.in_streak
    assert guard.should_roll_back()
    assert guard.diverging_since() == 21
    assert guard.newest_target() == 20
    guard.rolled_back(20)
    guard.restore({}, 20)
    for step in range(24, 24 + IN_A_ROW):
        judged(guard, step, NAN)
    assert guard.rolled_back_before()
    assert guard.newest_target() == 19, "20 did not help"
    for step in range(AGAIN_WITHIN, 3 * AGAIN_WITHIN):
        judged(guard, step, 6.0)
    judged(guard, 3 * AGAIN_WITHIN, NAN)
    assert not guard.rolled_back_before()
    assert guard.newest_target() == 3 * AGAIN_WITHIN - 1


def test_a_loss_that_passes_zero_as_it_diverges_is_not_good() -> None:
    """As seen at a rate of 776: what was saved after step 22 had a loss of zero for ever."""
    guard = NonFiniteGuard(scaled=False, uniform=8.3)
    guard.restore({}, 20)
    for step, loss, norm in ((20, 7.1, 262.0), (21, 1001.0, 3e8), (22, 6e-13, 0.6), (23, 6.4, 0.0)):
        judged(guard, step, loss, norm)
    for step in range(24, 24 + IN_A_ROW):
        judged(guard, step, NAN)
    assert (guard.diverging_since(), guard.newest_target()) == (21, 20)
    guard.restore({}, 20)
    judged(guard, 20, 100.0)
    for step in range(21, 21 + RECOVERED):
        assert guard.last_good == -1
        judged(guard, step, 7.0)
    assert guard.last_good == 20 + RECOVERED


def content(step: int, value: float = 1.0) -> dict[str, Any]:
    return {"teacher": {"w": torch.full((2,), value)}, "config": {}, "step": step}


def test_absurd_checkpoints_replace_each_other_and_can_be_set_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoints.write(tmp_path, content(step), keep_last=1)
    assert [checkpoints.step_of(path) for path in checkpoints.listed(tmp_path)] == [4, 3]
    checkpoints.write(tmp_path, content(5), keep_last=1, replace=True)
    assert [checkpoints.step_of(path) for path in checkpoints.listed(tmp_path)] == [5, 3]
    assert checkpoints.set_aside(tmp_path, 2) == [], "nothing would remain"
    assert checkpoints.set_aside(tmp_path, 3) == ["checkpoint.pt"]
    assert [checkpoints.step_of(path) for path in checkpoints.listed(tmp_path)] == [3]
    assert checkpoints.step_of(tmp_path / "checkpoint.pt") == 3
    assert checkpoints.step_of(tmp_path / "diverged.pt") == 5


def test_a_checkpoint_with_nan_is_skipped_by_name(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, content(1), keep_last=3)
    checkpoints.write(tmp_path, content(2, NAN), keep_last=3)
    found = checkpoints.newest(tmp_path)
    assert found[1]["step"] == 1
    assert "values that are not finite, in teacher.w" in found[2][0]
    none, nothing, damaged = checkpoints.newest(tmp_path, up_to=0)  # as a rollback looks
    assert (none, nothing) == (None, {})
    assert len(damaged) == 1, "a damaged one is named also where no other is old enough"


def test_checkpoints_without_hard_links_take_no_more_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        checkpoints.write(tmp_path, content(step), keep_last=3)

    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no hard links here")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", unsupported)
    monkeypatch.setattr(shutil, "copyfile", full)  # there is room for one more, not for two
    checkpoints.write(tmp_path, content(4), keep_last=3)
    assert [checkpoints.step_of(path) for path in checkpoints.listed(tmp_path)] == [4, 3, 2]
