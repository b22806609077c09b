"""One run, however its batch is shared out: over processes, over micro-steps, or half-way anew."""

from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT
from small_runs import SMALL, Start, losses, torchrun

STEPS = 20
# 64 photos are two steps of 32 an epoch. What stochastic depth draws does depend on the rank.
OPTIONS = ("--drop-path", "0", "--epochs", "10", "--global-batch-size", "32", "--save-steps", "7")


def without_batch(options: list[str]) -> list[str]:
    at = options.index("--batch-size")
    return [*options[:at], *options[at + 2 :]]


def run_on_two(folder: Path, data: Path, *options: str) -> None:
    arguments = [*without_batch(SMALL), "--data", str(data), "--output-dir", str(folder)]
    torchrun(str(ROOT / "train.py"), *arguments, *OPTIONS, *options)


def run_on_one(start: Start, folder: Path, *options: str) -> None:
    process = start(folder, *OPTIONS, *options, small=without_batch(SMALL))
    assert process.wait() == 0, process.said()[-3000:]


def assert_same_curve(folder: Path, whole: Path) -> None:
    one, other = np.array(losses(whole)), np.array(losses(folder))
    assert len(one) == len(other) == STEPS
    assert len(set(one[:, 1])) == STEPS, "the loss stood still: nothing was compared"
    np.testing.assert_allclose(other[:, :5], one[:, :5], rtol=1e-4)
    centers, same = (
        torch.load(path / "checkpoint.pt", weights_only=True)["ibot_loss"]
        for path in (whole, folder)
    )
    for name, center in centers.items():
        assert center.abs().max() > 0
        torch.testing.assert_close(same[name], center, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "run"


def test_processes_and_micro_steps_change_nothing(
    start: Start, tmp_path: Path, tiny: Path, whole: Path
) -> None:
    run_on_one(start, whole)
    run_on_one(start, tmp_path / "micro", "--micro-steps", "4")
    assert_same_curve(tmp_path / "micro", whole)
    run_on_two(tmp_path / "two", tiny)
    assert_same_curve(tmp_path / "two", whole)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(
    start: Start, tmp_path: Path, tiny: Path, whole: Path
) -> None:
    if not whole.exists():
        run_on_one(start, whole)
    folder = tmp_path / "grown"
    run_on_one(start, folder, "--stop-after", "7")
    run_on_two(folder, tiny, "--resume", "auto", "--stop-after", "13")
    run_on_one(start, folder, "--resume", "auto")
    assert_same_curve(folder, whole)
