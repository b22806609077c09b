"""The published configurations as a whole: built, and trained for a step under fake tensors."""

import pytest

from ibeton.benchmarks.evaluation.dense import counted, predicted


@pytest.mark.parametrize(
    ("task", "arch", "millions"),
    [
        ("detect", "vit_s", 81.6),
        pytest.param("segment", "vit_s", 41.4, marks=pytest.mark.slow),
        pytest.param("segment", "vit_b", 162.7, marks=pytest.mark.slow),
        pytest.param("detect", "vit_b", 151.4, marks=pytest.mark.slow),
    ],
)
def test_a_step_at_the_published_size_is_built_and_counted(task, arch, millions):
    found = counted(task, arch, images=2)
    assert found["weights M"] == pytest.approx(millions, abs=0.1)
    assert found["fixed GiB"] == pytest.approx(16e6 * millions / 2**30, rel=0.01)
    assert 0.5 < found["kept GiB"] < 10
    assert found["TFLOP"] > 1


def test_hours_follow_from_the_work_and_the_data_sheet():
    hours = predicted("segment", {"TFLOP": 2 * 763 * 3600 / 2_560_000}, images=2)
    assert hours["h100 hours"] == "4 - 10"  # one hour at the whole rate
