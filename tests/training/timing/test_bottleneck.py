"""Verdicts on recorded measurements, and on faults that cannot be missed."""

import pytest
import torch

from ibeton.pipeline.loaders import LOADERS
from ibeton.stages import StageWork
from ibeton.training.timing.bottleneck import LoaderResources, rank_line, verdict
from ibeton.training.timing.monitor import Adviser, StepMonitor
from ibeton.training.timing.speed import Window, loader_ceiling, slowest

# A ViT-S step of 64 images on a GPU, in seconds a step.
MODEL = {
    **{"teacher": 0.04, "student": 0.07, "loss": 0.01, "backward": 0.12},
    **{"optimizer": 0.01, "ema": 0.003, "other": 0.002},
}
GPU = LoaderResources(LOADERS["ffcv"], workers=4, cores=4, on_gpu=True)


def stage_work(
    read: float, decode: float, crop: float, workers: int, photos: int = 640
) -> dict[str, StageWork]:
    """Of milliseconds a photo."""
    times = {"read": read, "decode": decode, "crop": crop}
    return {
        name: StageWork(ms / 1000 * photos, photos, workers) for name, ms in times.items() if ms
    }


def window(wait: float, work: dict[str, StageWork], **changed: float) -> Window:
    """Ten steps of 64 images."""
    parts = MODEL | {"wait": wait, "copy": 0.001, "mask": 0.001} | changed
    return Window(10, 640, {name: 10 * seconds for name, seconds in parts.items()}, work)


def waiting(read: float, decode: float, crop: float, workers: int) -> Window:
    """A step as long as the loader's workers take for it, when they are never idle."""
    step = 64 * (read + decode + crop) / 1000 / workers
    return window(step - sum(MODEL.values()) - 0.002, stage_work(read, decode, crop, workers))


def test_a_slow_disk_is_told_from_a_slow_decode() -> None:
    found = verdict(waiting(read=30, decode=3, crop=0, workers=4), GPU)
    assert found.limit == "read"
    assert "page cache" in found.text
    assert "the model alone could take 251" in found.text


def test_a_decode_that_limits_wants_more_workers_where_there_are_cores() -> None:
    slow = waiting(read=0.1, decode=40, crop=0, workers=4)
    found = verdict(slow, LoaderResources(LOADERS["ffcv"], workers=4, cores=8, on_gpu=True))
    assert found.limit == "decode"
    assert "--workers 8" in found.text


def test_a_decode_that_limits_wants_smaller_photos_where_all_cores_work() -> None:
    found = verdict(waiting(read=0.1, decode=25, crop=0, workers=4), GPU)
    assert found.limit == "decode"
    assert "--max-resolution" in found.text


def test_crops_that_limit_go_to_the_gpu() -> None:
    found = verdict(waiting(read=0.1, decode=3, crop=40, workers=4), GPU)
    assert found.limit == "crop"
    assert "Cut on the GPU: --crops-on gpu" in found.text


def test_the_published_loader_is_told_of_the_faster_one() -> None:
    slow = waiting(read=0.1, decode=3, crop=45, workers=4)
    assert (
        "--loader ffcv"
        in verdict(slow, LoaderResources(LOADERS["pil"], workers=4, cores=4, on_gpu=False)).text
    )


def test_one_worker_instead_of_two() -> None:
    alone = waiting(read=0.01, decode=2, crop=9, workers=1)
    found = verdict(alone, LoaderResources(LOADERS["ffcv"], workers=1, cores=2, on_gpu=False))
    assert found.limit == "crop"
    assert "--workers 2" in found.text
    both = verdict(
        waiting(read=0.01, decode=2, crop=9, workers=2),
        LoaderResources(LOADERS["ffcv"], 2, 2, False),
    )
    assert "--workers" not in both.text


def test_a_loader_that_sleeps_is_no_slow_stage() -> None:
    asleep = window(wait=2.5, work=stage_work(0.1, 3, 0, workers=4))
    found = verdict(asleep, GPU)
    assert found.limit == "idle"
    assert "busy 2%" in found.text


def test_a_stream_of_the_gpu_may_limit() -> None:
    work = stage_work(0.1, 3, 0, workers=4)
    work["crop"] = StageWork(6.0, 640, workers=1, shared=False)
    found = verdict(window(wait=0.36, work=work), GPU)
    assert found.limit == "crop"
    assert loader_ceiling(work) == pytest.approx(640 / 6.0)


def test_copies_on_the_trainings_own_thread() -> None:
    found = verdict(window(wait=0.0, work=stage_work(0.1, 3, 10, workers=4), copy=0.2), GPU)
    assert found.limit == "copy"


@pytest.mark.parametrize("slow", ["teacher", "loss", "optimizer", "ema", "other"])
def test_a_stage_of_the_model_made_slow(slow: str) -> None:
    found = verdict(window(0.0, stage_work(0.1, 3, 0, workers=4), **{slow: 2.5}), GPU)
    assert found.limit == slow
    assert f"{slow} takes 9" in found.text


def test_with_floors_the_stage_with_most_to_gain_is_named() -> None:
    work = stage_work(0.1, 3, 0, workers=4)
    floors = {"teacher": 0.035, "student": 0.06, "backward": 0.11, "loss": 0.002, "ema": 0.001}
    found = verdict(window(0.0, work, optimizer=0.05), GPU, floors | {"optimizer": 0.005})
    assert found.limit == "optimizer"
    assert "10 times its floor" in found.text
    step = sum(MODEL.values()) + 0.04 + 0.002
    assert f"the step would give {64 / (step - 0.045):.4g} images/s" in found.text


def test_waiting_for_other_ranks() -> None:
    found = verdict(window(0.0, stage_work(0.1, 3, 0, workers=4), comm=0.3), GPU)
    assert found.limit == "comm"


def test_the_slowest_rank_is_named_with_the_stage_in_which_it_is_behind() -> None:
    fast = {"student": 100.0, "backward": 200.0, "comm": 160.0}
    late = {"student": 100.0, "backward": 350.0, "comm": 10.0}
    assert slowest([fast, fast, late, fast]) == (2, 450.0, "backward", 150.0)
    assert rank_line([fast, fast, late, fast]).startswith("rank 2 is the slowest")
    assert rank_line([fast, fast, fast]) == ""


def advice_of(adviser: Adviser, seconds_waiting: float, steps: int) -> list[str]:
    parts = MODEL | {"wait": seconds_waiting}
    work = stage_work(0.1, 25, 0, workers=4, photos=64)
    return [line for _ in range(steps) for line in adviser.add(64, parts, work)]


def test_advice_comes_once_per_cause_however_the_wait_goes_up_and_down() -> None:
    adviser = Adviser(GPU, 0, world_size=1, device=torch.device("cpu"), steps=5)
    assert advice_of(adviser, 0.15, steps=6) == [], "the first two steps are left out"
    (line,) = advice_of(adviser, 0.15, steps=21)
    assert "decode limits" in line
    for wait in (0.0, 0.15, 0.01, 0.2) * 4:
        assert advice_of(adviser, wait, steps=10) == [], "it was said"
    (other,) = advice_of(adviser, 2.5, steps=10)
    assert "no stage of the loader limits" in other


def test_short_epochs_are_named_where_no_stage_limits() -> None:
    asleep = window(wait=2.5, work=stage_work(0.1, 3, 0, workers=4))
    short = LoaderResources(LOADERS["ffcv"], 4, 4, on_gpu=True, steps_per_epoch=5)
    assert "an epoch has only 5 steps" in verdict(asleep, short).text
    assert "Epochs of few steps?" in verdict(asleep, GPU).text


def test_the_first_step_of_a_run_names_no_slow_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [{"student": 2820.0}, {"student": 100.0}]
    monkeypatch.setattr(StepMonitor, "_ranks", lambda self: ranks)
    monitor = StepMonitor(8, 1, 1, torch.device("cpu"), None, GPU)
    said = []
    for _ in range(3):
        monitor.add({"student": 1.0}, {})
        said.append(monitor.compare_ranks()[1])
    monitor.close()
    assert said[0] == []
    assert "rank 0 is the slowest" in said[1][0]
    assert said[2] == [], "said already"
