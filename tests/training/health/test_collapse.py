"""Runs that are made to collapse say so before they end; a sound one does not."""

from pathlib import Path

import pytest
from small_runs import PER_EPOCH, Start, records

from ibeton.training.health.collapse import patience

STEPS = 120
LENGTH = ("--epochs", str(STEPS // PER_EPOCH), "--local-crops-number", "0")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--warmup-teacher-temp 1 --teacher-temp 1", "the teacher's targets are uniform"),
        (
            "--warmup-teacher-temp 0.01 --teacher-temp 0.01 --center-momentum 0.9999 --lambda2 0",
            "the teacher gives all images the same prototype",
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


def test_a_sign_must_last_longer_the_longer_the_run() -> None:
    assert patience(300, 30) == 100
    assert patience(4700, 94) == 470
    assert patience(1_000_000, 1250) == 1250
    assert patience(1_000_000, 125) == 1000
