"""What the progress line shows, at 80 columns and piped."""

from contextlib import closing
from pathlib import Path

import pytest
from small_runs import Start

from ibeton.training.log.progress_line import clock, place_fields, progress_line, step_fields
from ibeton.training.log.run_log import RunLog

RECORD = {
    **{"loss": 6.8201, "cls": 6.51, "patch": 0.31, "images_per_s": 963.4, "data_wait": 0.02},
    **{"peak_share": 0.16, "memory_gib": 6.12},
}
FIELDS = step_fields(RECORD) | place_fields(150, 6250, 63, 10931.0)


def test_a_wide_line_has_everything_in_order() -> None:
    assert progress_line(FIELDS, 200) == (
        "epoch 3/100  step 150/6,250  loss 6.820  (cls 6.510 patch 0.310)  963 images/s"
        "  data wait 2%  16% of peak  6.1 GiB  ETA 3:02:11"
    )


@pytest.mark.parametrize("width", [20, 40, 69, 80, 100])
def test_a_line_fits_its_width_and_keeps_what_matters_most(width: int) -> None:
    line = progress_line(FIELDS, width)
    assert len(line) <= max(width, 24)
    assert line.startswith("epoch 3/100")
    assert "loss 6.820" in line
    if width >= 69:  # 80 columns less the bar
        assert "963 images/s" in line
        assert "ETA 3:02:11" in line
        assert "data wait 2%" in line


def test_clocks() -> None:
    assert [clock(s) for s in (-5, 59.6, 7261, 72 * 3600)] == [
        *("0:00:00", "0:01:00", "2:01:01", "3.0 days")
    ]


def test_a_short_piped_run_prints_its_losses(start: Start, tmp_path) -> None:
    process = start(tmp_path / "run", "--stop-after", "3")
    assert process.wait() == 0, process.said()[-2000:]
    lines = [line for line in process.said().splitlines() if " loss " in line]
    places = [line.split("  ")[1] for line in lines]
    assert (places[0], places[-1]) == ("step 1/24", "step 3/24")  # step 2 on a very slow machine
    assert not any(line.startswith(("{", "}")) for line in process.said().splitlines())
    assert process.said().splitlines()[-1].startswith("checkpoint "), "the result comes last"


@pytest.mark.parametrize("whole", [True, False])
def test_the_time_left_leaves_out_the_steps_that_compile(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A minute for the first step, then 40 seconds for each; piped, so that each is a line. If not
    `whole`, the run stops ten steps before its end."""
    now = 100.0
    last = 50 if whole else 40
    monkeypatch.setattr("ibeton.training.log.run_log.time.monotonic", lambda: now)
    with closing(
        RunLog(tmp_path, first_step=10, total_steps=50, per_epoch=10, last_step=last)
    ) as log:
        capsys.readouterr()
        for step in range(11, last + 1):
            now += 60.0 if step == 11 else 40.0
            log.progress(step, RECORD)
    said = [line for line in capsys.readouterr().out.splitlines() if "step" in line]
    assert len(said) == last - 10
    assert all("ETA" not in line for line in said[:2])
    left = [line.split("ETA ")[1] for line in said[2:]]
    assert left[0] == clock((last - 13) * 40)
    assert left[-2:] == ["0:00:40", "0:00:00"]
