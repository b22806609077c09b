"""Options as the command line takes them."""

import pytest

from ibeton.evaluation.frozen import knn
from ibeton.training.config import parse


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "NaN", "1e999"])
@pytest.mark.parametrize("option", ["--lr", "--weight-decay", "--clip-grad", "--max-hours"])
def test_floats_that_are_not_finite_are_refused(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse([f"{option}={value}"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: argument {option}")
    assert said.endswith(f": {value} is not a finite number\n")
    assert said.count("\n") == 1


def test_so_are_those_in_a_list_and_those_of_an_evaluation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse(["--global-crops-scale", "nan", "1"])
    assert "nan is not a finite number" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        knn.main(["--checkpoint", "a", "--train", "b", "--val", "c", "--temperature", "inf"])
    assert "inf is not a finite number" in capsys.readouterr().err
