"""The budget of a step: against profiles of a GPU, and as a ceiling on launches and bytes."""

import pytest

from ibeton.benchmarks.harness import budget_launches as b
from ibeton.benchmarks.harness.budget_launches import Settings, step_launches
from ibeton.benchmarks.harness.budget_rates import DEVICES, by_category
from ibeton.model import ModelConfig

# The step of ViT-S/16 at batch 64 in half precision, 2 x 224 + 10 x 96 pixels. Before the kernels:
# 1,603 launches (the profile has 1,997, with memsets), 110 GB and 63 ms. On an H100: 31.0 ms.
LAUNCHES, GIGABYTES, MILLISECONDS = 525, 61.1, 31.5
# Milliseconds per step by category, from profiles of 2026-11-26 (one H100 80GB SXM, torch 2.11,
# triton 3.6, commit 216b8a1): ViT-S/16, 2 x 224 + 10 x 96 px, fp16, norm and GELU recomputed.
# Batch size -> category -> sum over the `aten::` rows of its operators.
PROFILED = {
    64: {
        b.PRODUCTS: 13.60,
        b.ATTENTION: 6.22,
        b.COPIES: 7.98,
        b.ELEMENTWISE: 8.29,
        b.NORM: 6.02,
        b.NORM_BACKWARD: 6.65,
        b.GELU: 3.19,
        b.GELU_BACKWARD: 1.72,
        b.CONCATENATION: 4.13,
        b.SUMS: 3.58,
        b.OPTIMIZER: 0.54,
    },
    256: {
        b.PRODUCTS: 48.89,
        b.ATTENTION: 23.51,
        b.COPIES: 28.62,
        b.ELEMENTWISE: 31.07,
        b.NORM: 23.39,
        b.NORM_BACKWARD: 12.04,
        b.GELU: 12.47,
        b.GELU_BACKWARD: 6.70,
        b.CONCATENATION: 16.03,
        b.SUMS: 9.27,
    },
}
# The same step at batch 64 with our kernels, replayed as a CUDA graph, nothing recomputed; one H100
# 80GB SXM, 2026-11-27, torch 2.11, triton 3.6. All kernels: 31.0 ms.
PROFILED_KERNELS = {
    b.PRODUCTS: 12.97,
    b.ATTENTION: 5.96,
    b.ROW_KERNELS: 6.00,
    b.STREAM_KERNELS: 4.54,
}
PROFILED_LAUNCHES = 1997  # of which 223 are memsets, which are not counted here


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
