"""The budget of a step: against profiles of a GPU, and as a ceiling on launches and bytes."""

import pytest

from ibeton.benchmarks.harness.budget_launches import Settings, step_launches
from ibeton.benchmarks.harness.budget_rates import (
    DEVICES,
    PROFILED,
    PROFILED_KERNELS,
    PROFILED_LAUNCHES,
    by_category,
)
from ibeton.model import ModelConfig

# The step of ViT-S/16 at batch 64 in half precision, 2 x 224 + 10 x 96 pixels. Before the kernels:
# 1,603 launches (the profile has 1,997, with memsets), 110 GB and 63 ms. On an H100: 31.0 ms.
LAUNCHES, GIGABYTES, MILLISECONDS = 525, 61.1, 31.5


def test_launches_bytes_and_predicted_time_stay_below_their_ceilings():
    launches = step_launches(Settings(ModelConfig(recompute="off"), 64))
    assert sum(x.kernels for x in launches) <= LAUNCHES
    assert sum(x.bytes for x in launches) <= 1e9 * GIGABYTES
    predicted = by_category(launches, DEVICES["h100"])
    assert 1e3 * sum(predicted.values()) <= MILLISECONDS
    assert {"row kernels", "stream kernels"} < set(predicted)
    assert not {"norm", "norm backward", "GELU"} & set(predicted)  # nothing escapes the kernels


def test_a_v100_runs_the_library_s_products_and_attention():
    settings = Settings(ModelConfig(recompute="off"), 64, capability=70)
    launches = step_launches(settings)
    names = {x.name for x in launches}
    assert "_pack_gradients_kernel" in names
    assert "_attention_kernel" not in names
    assert sum(x.kernels for x in launches) <= 660
    predicted = by_category(launches, DEVICES["v100"])
    assert 64 / sum(predicted.values()) >= 300  # images/s


def test_the_kernels_are_within_a_tenth_of_their_profile():
    launches = step_launches(Settings(ModelConfig(recompute="off"), 64))
    predicted = by_category(launches, DEVICES["h100"])
    for category, milliseconds in PROFILED_KERNELS.items():
        assert 1e3 * predicted[category] == pytest.approx(milliseconds, rel=0.1), category


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
