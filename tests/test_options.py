"""Options as the command line takes them."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from ibeton.evaluation import show
from ibeton.evaluation.frozen import knn
from ibeton.options import Parser, check_output_file, option, unknown_choices
from ibeton.training.config import from_values, parse


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "NaN", "1e999"])
@pytest.mark.parametrize("option", ["--lr", "--weight-decay", "--clip-grad", "--max-hours"])
def test_floats_that_are_not_finite_are_refused(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse([f"{option}={value}"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said == f"error: {option}: {value} is not a finite number\n"


def test_so_are_those_in_a_list_and_those_of_an_evaluation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse(["--global-crops-scale", "nan", "1"])
    assert "nan is not a finite number" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        knn.main(["--checkpoint", "a", "--train", "b", "--val", "c", "--temperature", "inf"])
    assert "inf is not a finite number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("folder", "is a folder: give the name of a file"),
        ("photo.jpg", "give a name that ends in .json"),
        ("no/scores.json", "there is no folder"),
        ("package.json", "exists, and is not replaced: give another name"),
    ],
)
def test_an_output_file_replaces_nothing_but_its_like(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "package.json").write_text('{"name": "mine"}')
    (tmp_path / "scores.json").write_text('{"scores": {}}')
    with pytest.raises((ValueError, OSError), match=says):
        check_output_file("--json", tmp_path / name, ".json", b'{"scores": ')
    check_output_file("--json", tmp_path / "scores.json", ".json", b'{"scores": ')
    check_output_file("--json", tmp_path / "new.json", ".json", b'{"scores": ')
    with pytest.raises(FileExistsError):
        check_output_file("--json", tmp_path / "scores.json", ".json")


def test_integers_beyond_64_bits_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--data", "x", "--seed", "99999999999999999999", "--head-layers", "-" + "9" * 30])
    said = capsys.readouterr().err
    assert "--seed: 99999999999999999999 does not fit in 64 bits" in said
    assert said.count("does not fit in 64 bits") == 2
    with pytest.raises(ValueError, match="--depth 1000000000 must be at most 1000"):
        parse(["--data", "x", "--depth", "1000000000"])
    with pytest.raises(ValueError, match="--global-crops-number 16 must be at most 15"):
        parse(["--data", "x", "--global-crops-number", "16"])


def test_help_lists_each_option_by_one_spelling_and_names_its_default_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit):
        parse(["--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: train.py [OPTIONS]\n")
    assert "--global-batch-size N" in said
    assert "--shared-head, --no-shared-head\n" in said
    assert "_batch" not in said, "underscores are accepted, not listed"
    assert said.count("(default: none)") == 1, "of --norm-in-head, where none is a value"
    assert max(map(len, said.splitlines())) <= 120, "only choices are longer than 80"


def test_help_of_a_subcommand_goes_by_its_whole_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["ibeton show"])
    with pytest.raises(SystemExit):
        show.main(["attention", "--help"])
    usage = capsys.readouterr().out.split("\n\n")[0]
    assert " ".join(usage.split()).startswith("usage: ibeton show attention [-h] --checkpoint")


@dataclass
class Chosen:
    """Settings with choices, one and several."""

    color: str = option("red", "a color", ("red", "green"))
    sizes: tuple[str, ...] = option((), "sizes", ("small", "large"))


def test_each_item_of_a_list_is_held_against_the_choices() -> None:
    assert not list(unknown_choices(Chosen("green", ("large", "small"))))
    assert list(unknown_choices(Chosen("blue", ("large", "huge")))) == [
        "--color blue: expected one of red, green",
        "--sizes huge: expected one of small, large",
    ]


def test_trackers_that_are_installed_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert parse(["--data", "x", "--log-to", "wandb", "mlflow"]).run.log_to == ("wandb", "mlflow")
    with pytest.raises(ValueError, match=r"--log-to comet: expected one of wandb, mlflow"):
        from_values({"data": ("x",), "log_to": ("comet",)})


def test_underscores_count_as_dashes_in_options_alone() -> None:
    config = parse(["--data", "a_b", "--global_batch_size=64", "--no-shared_head"])
    assert (config.run.global_batch_size, config.model.shared_head) == (64, False)
    assert config.pipeline.data == ("a_b",)
    parser = Parser()
    parser.add_argument("--a-b")
    parser.add_argument("rest", nargs="*")
    assert parser.parse_args(["--a_b", "c_d", "--", "--a_b"]).rest == ["--a_b"]
