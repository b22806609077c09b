"""The clock of the stages: parts add up, nothing is counted twice, off means off."""

import threading
from collections.abc import Iterator

import pytest
import torch

from ibeton import stages
from ibeton.stages import StageClock, Work, stage

CPU = torch.device("cpu")


class Ticks:
    """A clock whose hands are moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    ticks = Ticks()
    monkeypatch.setattr(stages, "time", ticks)
    return ticks


@pytest.fixture
def clock(ticks: Ticks) -> Iterator[StageClock]:
    clock = StageClock(CPU)
    stages.use(clock)
    clock.start()
    yield clock
    stages.use(None)


def test_parts_add_up_to_the_lap(clock: StageClock, ticks: Ticks) -> None:
    ticks.now += 1
    with stage("teacher"):
        ticks.now += 2
    ticks.now += 4
    with stage("student"):
        ticks.now += 8
    with stage("teacher"):
        ticks.now += 16
    assert clock.lap().seconds() == {"other": 5, "teacher": 18, "student": 8}


def test_a_stage_within_another_is_counted_once(clock: StageClock, ticks: Ticks) -> None:
    with stage("optimizer"):
        ticks.now += 1
        with stage("comm"):
            ticks.now += 2
        ticks.now += 4
    assert clock.lap().seconds() == {"other": 0, "optimizer": 5, "comm": 2}


def test_the_rest_of_a_stage_may_belong_to_another(clock: StageClock, ticks: Ticks) -> None:
    with stage("backward"):
        ticks.now += 1
        thread = threading.Thread(target=stages.rest_is, args=("comm",))  # as autograd's do
        thread.start()
        thread.join()
        ticks.now += 2
    ticks.now += 4
    assert clock.lap().seconds() == {"other": 4, "backward": 1, "comm": 2}


def test_a_lap_begins_where_the_last_one_ended(clock: StageClock, ticks: Ticks) -> None:
    ticks.now += 1
    first = clock.lap()
    ticks.now += 2
    second = clock.lap()
    ticks.now += 4
    clock.start()  # an evaluation lies between
    ticks.now += 8
    third = clock.lap()
    assert [lap.seconds() for lap in (first, second, third)] == [
        {"other": 1},
        {"other": 2},
        {"other": 8},
    ]


def test_a_stage_that_raises_ends(clock: StageClock, ticks: Ticks) -> None:
    def fail() -> None:
        with stage("loss"):
            ticks.now += 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    ticks.now += 2
    assert clock.lap().seconds() == {"other": 2, "loss": 1}


def test_without_a_clock_nothing_is_marked(clock: StageClock, ticks: Ticks) -> None:
    stages.use(None)
    with stage("loss"):
        ticks.now += 1
    stages.rest_is("comm")
    assert clock.lap().seconds() == {"other": 1}


def test_only_stages_that_exist_can_be_named() -> None:
    with pytest.raises(ValueError, match="'techer': expected one of"):
        stage("techer")


def test_a_profiler_sees_the_names(clock: StageClock) -> None:
    clock.named = True
    with torch.profiler.profile(acc_events=True) as profiler, stage("teacher"):
        torch.ones(3).sum()
    assert "teacher" in {event.key for event in profiler.key_averages()}


def test_work_of_many_threads_is_summed() -> None:
    work = Work()

    def add() -> None:
        for _ in range(1000):
            work.add("decode", 0.25, photos=2, workers=4)

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work_done = work.take()["decode"]
    assert (work_done.seconds, work_done.photos) == (2000.0, 16000)
    assert work_done.per_photo == 0.125
    assert work_done.ceiling == 32  # images/s of four workers
    assert work.take() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_marks_follow_the_device() -> None:
    clock = StageClock(torch.device("cuda"))
    spins = 200_000_000  # cycles: at least 60 ms below 3.3 GHz, while the host takes microseconds
    for _ in range(2):  # the second with events that were used before
        stages.use(clock)
        clock.start()
        with stage("student"):
            torch.cuda._sleep(spins)
        stages.use(None)
        lap = clock.lap()
        torch.cuda.synchronize()
        assert lap.done()
        parts = lap.seconds()
        assert parts["student"] > 0.06
        assert set(parts) == {"other", "student"}
