"""What a run says of its memory, time and disk: in words, and held against a real run."""

import re
from pathlib import Path

import pytest
import torch
from small_runs import Start, records

from ibeton.model import ModelConfig, build
from ibeton.model.checkpoint import model_state
from ibeton.training.timing.bottleneck import LoaderResources
from ibeton.training.timing.forecast import (
    cache_line,
    checkpoint_bytes,
    disk_line,
    duration,
    forecast_line,
    gib,
    number,
)
from ibeton.training.timing.monitor import Adviser

GIB = 2**30
CPU = torch.device("cpu")


NOTHING = LoaderResources(None, workers=1, cores=1, on_gpu=False)


def said(left: int, steps: int, backward: float = 0.5, wait: float = 0.0) -> list[str]:
    """What four processes hear of a forecast, step by step; the first two steps are slow."""
    adviser = Adviser(NOTHING, left, world_size=4, device=CPU)
    times = [100.0] * 2 + [backward] * (steps - 2)
    added = (adviser.add(8, {"wait": wait, "backward": seconds}, {}) for seconds in times)
    return [" ".join(line for line in lines if "forecast" in line) for lines in added]


def test_a_forecast_comes_once_from_steps_after_the_first_two() -> None:
    lines = said(left=1002, steps=22)
    (line,) = filter(None, lines)
    assert lines.index(line) == 11, "two skipped, ten measured"
    assert "8.25 min left at 64 images/s; the model limits (data wait 0%)" in line
    assert re.search(r"memory [\d,.]+ [MG]iB at the peak", line)


def test_a_slow_step_is_not_waited_for_ten_times() -> None:
    lines = said(left=100, steps=5, backward=11.0)
    assert [bool(line) for line in lines] == [False, False, False, True, False]


@pytest.mark.parametrize("left", [-3, 0, 1, 12])
def test_nothing_is_forecast_of_a_run_that_is_over_by_then(left: int) -> None:
    assert not any(said(left, steps=13))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.01, "1 s"),
        (59, "59 s"),
        (900, "15 min"),
        (3.5 * 3600, "3.5 h"),
        (40 * 3600, "40 h"),
        (72 * 3600, "3 days"),
        (1250 * 86400, "1,250 days"),
    ],
)
def test_durations_have_a_unit_that_suits(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_numbers_have_three_digits_and_no_powers_of_ten() -> None:
    assert [number(v) for v in (0.0123, 1.5, 99.94, 1250.4, 1e6)] == [
        *("0.0123", "1.5", "99.9", "1,250", "1,000,000")
    ]
    assert [gib(v) for v in (1.5 * GIB, 300 * 2**20, 120 * GIB)] == [
        "1.5 GiB",
        "300 MiB",
        "120 GiB",
    ]
    assert "1,250 images/s; the loader limits" in forecast_line(60, 1250.0, 0.5, CPU)


def test_lines_on_cache_and_disk() -> None:
    assert "64 GiB of memory free: fits in memory, so" in cache_line(50 * GIB, 64 * GIB)
    assert "every epoch reads from disk" in cache_line(129 * GIB, 64 * GIB)
    assert disk_line(2 * GIB, 9, 20 * GIB).endswith("20 GiB free: fits"), "nine, and one partial"
    assert "will not fit" in disk_line(2 * GIB, 10, 20 * GIB)
    assert disk_line(2 * GIB, 0, 20 * GIB).startswith("2 GiB for the one being written, 2 GiB each")


def test_times_beside_each_other_have_one_unit() -> None:
    hours = 43 * 3600.0
    assert duration(hours) == "43 h"
    assert duration(hours, beside=60 * 3600.0) == "1.79 days"


def test_a_checkpoint_is_as_large_as_its_tensors() -> None:
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, "out_dim": 96, "hidden_dim": 40}
    ibot = build(ModelConfig(**sizes, bottleneck_dim=20))
    student, teacher, _ = model_state(ibot).values()
    of_student, of_teacher = (
        sum(t.nbytes for name, t in state.items() if "last_layer2" not in name)  # saved once
        for state in (student, teacher)
    )
    for optimizer, moments in (("adamw", 2), ("sgd", 1)):
        expected = (1 + moments) * of_student + of_teacher
        assert checkpoint_bytes(ibot, optimizer) == pytest.approx(expected, rel=1e-3)


def test_a_run_tells_what_it_will_take(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder, "--epochs", "100000", "--keep-every", "10", "--stop-after", "16")
    assert process.wait() == 0, process.said()[-2000:]
    text = process.said()
    assert "page cache:" in text
    assert "read from disk only once" in text
    disk = next(line for line in text.splitlines() if line.startswith("disk:"))
    assert re.search(r"for 2 checkpoints and the one being written, [\d.]+ MiB", disk), (
        "two epochs, not 100,000"
    )
    (line,) = (line for line in text.splitlines() if "forecast from the first steps" in line)
    assert " left at " in line
    assert len(records(folder)) == 16
    again = start(folder, "--epochs", "100000", "--keep-every", "10", "--stop-after", "16",
                  "--resume", "auto")  # fmt: skip
    assert again.wait() == 0, again.said()[-2000:]
    assert "forecast" not in again.said(), "there is nothing left"
    assert not re.search(r"\s-0", again.said())
