"""The budget of a step: against profiles of a GPU, and as a ceiling on launches and bytes."""

import pytest

from ibeton.benchmarks.harness.budget_launches import Settings, step_launches
from ibeton.benchmarks.harness.budget_rates import (
    DEVICES,
    PROFILED,
    PROFILED_HOST_S,
    PROFILED_LAUNCHES,
    by_category,
    host_seconds,
)
from ibeton.model import ModelConfig


@pytest.mark.slow
@pytest.mark.parametrize("images", PROFILED)
def test_every_category_is_within_a_quarter_of_the_profile(images):
    """The step as it was profiled: without the blocks' Triton kernels."""
    launches = step_launches(Settings(ModelConfig(), images, kernels=False))
    predicted = by_category(launches, DEVICES["h100"])
    for category, milliseconds in PROFILED[images].items():
        if milliseconds > 1:
            assert 1e3 * predicted[category] == pytest.approx(milliseconds, rel=0.25), category
    assert sum(x.kernels for x in launches) == pytest.approx(PROFILED_LAUNCHES, rel=0.25)
    assert host_seconds(launches, DEVICES["h100"]) == pytest.approx(PROFILED_HOST_S, rel=0.25)
