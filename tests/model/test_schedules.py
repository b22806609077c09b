"""Schedules against the published ones."""

import numpy as np
import pytest

from ibeton.model.schedules import cosine_schedule, temperature_schedule

COSINES = ("lr_warm", "lr_vits_800", "wd", "momentum", "one_epoch", "warm_one_iter")
NOT_OFFERED = {"lr_start_nonzero"}  # its warm-up does not start at 0, and no recipe asks for that


@pytest.mark.parametrize("name", COSINES)
def test_cosine(reference, name):
    arrays = reference("schedules")
    schedule = cosine_schedule(
        float(arrays[f"{name}/arg_base_value"]),
        float(arrays[f"{name}/arg_final_value"]),
        int(arrays[f"{name}/arg_epochs"]),
        int(arrays[f"{name}/arg_niter_per_ep"]),
        int(arrays.get(f"{name}/arg_warmup_epochs", 0)),
    )
    assert schedule.dtype == np.float64
    np.testing.assert_allclose(schedule, arrays[f"{name}/values"], rtol=1e-12, atol=1e-18)


def test_every_published_cosine_is_tested(reference):
    stored = {key.split("/")[0] for key in reference("schedules") if key.endswith("/values")}
    assert stored == {*COSINES, *NOT_OFFERED}


@pytest.mark.parametrize("i", range(6))
def test_temperatures(reference, i):
    arrays = reference("schedules")
    start, final, warmup, epochs, start_epoch = arrays[f"temp{i}/args"]
    counts = int(warmup), int(epochs)
    cls = temperature_schedule(start, final, *counts)
    patch = temperature_schedule(start, final, *counts, int(start_epoch))
    np.testing.assert_allclose(cls, arrays[f"temp{i}/cls"], rtol=1e-12)
    np.testing.assert_allclose(patch, arrays[f"temp{i}/patch"], rtol=1e-12)


def test_peak_comes_twice_and_the_end_is_never_reached():
    schedule = cosine_schedule(1.0, 0.0, epochs=4, steps_per_epoch=5, warmup_epochs=1)
    assert schedule[0] == 0
    assert list(np.flatnonzero(schedule == 1.0)) == [4, 5]
    assert schedule[-1] > 0


def test_warm_up_for_the_whole_run():
    schedule = cosine_schedule(1.0, 0.0, epochs=2, steps_per_epoch=2, warmup_epochs=2)
    np.testing.assert_allclose(schedule, [0, 1 / 3, 2 / 3, 1])


def test_warm_ups_longer_than_the_run_are_refused():
    with pytest.raises(ValueError, match="warm-up of 11 epochs does not fit in 10"):
        cosine_schedule(1.0, 0.0, 10, 5, warmup_epochs=11)
    with pytest.raises(ValueError, match="warm-up of 6 epochs from epoch 5 does not fit in 10"):
        temperature_schedule(0.04, 0.07, 6, 10, 5)
