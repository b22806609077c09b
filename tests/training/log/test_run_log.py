"""What is read back of log.jsonl, and what several ranks add to it."""

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ibeton.stages import StageClock
from ibeton.training.log.curves import model_facts, run_names
from ibeton.training.log.metrics import DelayedMetrics
from ibeton.training.log.run_log import RunLog, read_records

RECORDS = [
    {"step": 0, "epoch": 0, "knn_top1": 20.0, "knn_k": 20},
    {"step": 0, "loss": 3.0, "stage_ms": {"wait": 1.0}, "ranks": [{"wait": 1.0}]},
    {"step": 1, "loss": 2.0, "loader_ms": {"read": 1.0}},
    {"step": 2, "epoch": 1, "knn_top1": 50.0, "knn_k": 20},
    {"step": 2, "loss": 1.0},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [*map(json.dumps, RECORDS), '{"step": 3, "lo']  # cut short by a kill
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_times_are_not_read_and_stay_in_the_file(folder: Path) -> None:
    assert [*map(len, read_records(folder / "log.jsonl"))] == [4, 2, 2, 4, 2]
    with closing(RunLog(folder, first_step=2, total_steps=9, per_epoch=2)) as log:
        assert log.scores() == {0: 20.0, 2: 50.0}
        log.roll_back(1)
        assert log.scores() == {0: 20.0}
        log.record({"step": 2, "epoch": 1, "knn_top1": 60.0})
        assert log.scores() == {0: 20.0, 2: 60.0}
    kept = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert kept[:2] == RECORDS[:2]


def test_a_model_card_has_no_score_of_an_earlier_step(folder: Path) -> None:
    facts = {step: model_facts(folder, step, 2) for step in (1, 2)}
    assert facts[1] == {"trained for": "1 steps, 0.5 epochs", "last loss": "3.0000"}
    assert facts[2]["k-NN top-1"] == "50.00 % (k 20)"
    assert facts[2]["last loss"] == "2.0000"


def test_runs_of_one_name_are_told_apart_by_their_paths() -> None:
    assert run_names([Path("old/first"), Path("new/second")]) == ["first", "second"]
    assert run_names([Path("old/first"), Path("new/first")]) == ["old/first", "new/first"]


def test_what_ranks_cannot_read_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda values: values.mul_(2))  # two that are equal
    metrics, clock = DelayedMetrics(2), StageClock(torch.device("cpu"))
    clock.start()
    metrics.enqueue({"step": 0, "unreadable": 3}, {"loss": torch.tensor(1.5)}, clock)
    record = metrics.resolve()
    assert record is not None
    assert (record["unreadable"], record["loss"], record["stop"]) == (6, 1.5, False)
