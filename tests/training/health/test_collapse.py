"""Runs that are made to collapse say so before they end; a sound one does not."""

import math
from pathlib import Path

import pytest
from small_runs import PER_EPOCH, SMALL, Start, records

from ibeton.benchmarks.throughput import leave
from ibeton.train import prepare
from ibeton.training import checkpoints
from ibeton.training.config import parse
from ibeton.training.health.collapse import CollapseAlarm, patience
from ibeton.training.run import restore, save

STEPS = 120
LENGTH = ("--epochs", str(STEPS // PER_EPOCH), "--local-crops-number", "0")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--warmup-teacher-temp 1 --teacher-temp 1", "the teacher's targets are uniform"),
        pytest.param(
            "--warmup-teacher-temp 0.01 --teacher-temp 0.01 --center-momentum 0.9999 --lambda2 0",
            "the teacher gives all images the same prototype",
            marks=pytest.mark.slow,
        ),
        ("", ""),
    ],
    ids=["a hot teacher", "no centering", "a sound run"],
)
def test_a_run_says_that_it_collapses(
    start: Start, tmp_path: Path, options: str, says: str
) -> None:
    run = start(tmp_path / "run", *LENGTH, *options.split())
    assert run.wait() == 0, run.said()[-3000:]
    said = [line for line in run.said().splitlines() if line.startswith("collapse:")]
    assert all(says and says in line for line in said), said
    assert bool(said) == bool(says), said
    last = records(run.folder)[-1]
    assert 1 <= last["prototypes"] <= 64.1


def test_checkpoints_from_before_the_signs_stay() -> None:
    alarm = CollapseAlarm(out_dim=64, lambda1=1.0, patience=30, images=8)
    healthy = {"cls": 3.0, "teacher_entropy": 2.0, "prototypes": 20.0, "spread": 0.5}
    sound, said = [], []
    for step in range(0, 120, 10):
        collapsed = {"prototypes": 1.0} if step < 20 or 40 <= step < 90 else {}
        said += alarm.add({"step": step, **healthy, **collapsed})
        sound.append(alarm.last_sound)
    assert sound == [math.inf] * 4 + [30] * 5 + [math.inf] * 3
    assert len(said) == 1
    assert said[0].endswith("; checkpoints up to step 30 stay")


def test_one_image_per_process_is_no_sign() -> None:
    alarm = CollapseAlarm(out_dim=64, lambda1=1.0, patience=30, images=1)
    records = [
        {"step": step, "cls": 3.0, "teacher_entropy": 2.0, "prototypes": 1.0}
        for step in range(0, 120, 10)
    ]
    assert not [line for record in records for line in alarm.add(record)]


@pytest.mark.parametrize("last_sound", [math.inf, 4])
def test_saves_of_a_collapsed_run_replace_each_other(
    tiny: Path, tmp_path: Path, last_sound: float
) -> None:
    """Saved at steps 2, 4, 6, 8 and 10, three of them kept; all steps are good."""
    options = [*SMALL, "--loader", "pil", "--data", str(tiny), "--output-dir", str(tmp_path)]
    run = prepare(parse(options))
    leave(run)
    run.alarm.last_sound = last_sound
    for step in range(2, 12, 2):
        run.step, run.guard.last_good = step, step - 1
        save(run)
        run.guard.last_good = step
        if step == 6:  # the run is stopped and resumed
            run.alarm.last_sound = math.inf
            path = run.folder / checkpoints.NEWEST
            restore(run, path, checkpoints.load_sound(path))
    kept = sorted(checkpoints.step_of(path) for path in checkpoints.listed(run.folder))
    assert kept == ([6, 8, 10] if last_sound == math.inf else [2, 4, 10])


def test_a_sign_must_last_longer_the_longer_the_run() -> None:
    assert patience(300, 30) == 100
    assert patience(4700, 94) == 470
    assert patience(1_000_000, 1250) == 1250
    assert patience(1_000_000, 125) == 1000
