"""Command lines: what is refused, in which words, and what a saved configuration starts."""

import json
from pathlib import Path

import pytest

from ibeton.model.optim import build_optimizer, load_optimizer_state
from ibeton.options import Parser, add_options
from ibeton.pipeline.convert.plan import ConvertOptions
from ibeton.training.config import Config, from_values, parse, read_preset


def refused(line: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What is said of the command line, problem by problem."""
    try:
        parse(line.split())
    except ValueError as error:
        return f"error: {error}".splitlines()
    except SystemExit:
        return capsys.readouterr().err.strip().splitlines()
    raise AssertionError(f"accepted: {line}")


def test_all_impossible_options_are_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused("--epochs 0 --out-dim 0 --batch-size 0 --gray-p 2 --lr -1", capsys)
    assert all(line.startswith("error: ") for line in said)
    for option in ("--data", "--epochs", "--out-dim", "--batch-size", "--gray-p", "--lr"):
        assert any(option in line for line in said), option


def test_all_misspelled_options_are_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused("--data x --epochs few --lr nan --arch vit_small --nonsense 3", capsys)
    assert said == [
        "error: --epochs: invalid int value: 'few'",
        "error: --lr: nan is not a finite number",
        "error: --arch: vit_small is called vit_s here",
        "error: unknown option --nonsense: --help lists the options",
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--data_path /x", "unknown option --data_path: here it is --data"),
        ("--batch_size_per_gpu 64", "here it is --batch-size"),
        ("--use_fp16 true", "here it is --precision fp16"),
        ("--saveckp_freq 20", "here it is --keep-every"),
        ("--num_workers 10", "here it is --workers"),
        ("--act_in_head gelu", "here it is --act"),
        ("--use_bn_in_head true", "here it is --norm-in-head bn"),
        ("--local_rank 0", "not needed, torchrun sets it"),
        ("--in-chans 1", "crops are RGB, so it was removed"),
        ("--momentum 0.9", "here it is --momentum-teacher, or --center-momentum"),
        ("--bach-size 4", "did you mean --batch-size?"),
        ("--arch vit_base", "vit_base is called vit_b here"),
        ("--arch swin_tiny", "swin_t7 or swin_t14"),
        ("--arch vit_z", "did you mean vit_"),
        ("--precision half", "half is called fp16 here"),
        ("--norm_in_head syncbn", "syncbn is called bn here"),
        ("--loader fcv", "did you mean ffcv?"),
    ],
)
def test_names_of_the_published_trainers_lead_to_ours(
    given: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = refused(f"--data x {given}", capsys)
    assert said in line


def test_switches_take_the_published_true_and_false() -> None:
    line = "--data x --shared_head false --norm_last_layer true --shard-optimizer --no-qkv-bias"
    config = parse(line.split())
    model = config.model
    assert (model.shared_head, model.norm_last_layer, model.qkv_bias) == (False, True, False)
    assert config.run.shard_optimizer


def test_a_switch_takes_no_file_for_its_value() -> None:
    parser = Parser()
    parser.add_argument("source")
    add_options(parser, ConvertOptions)
    assert vars(parser.parse_args(["--verify", "photos"])) == {"source": "photos", "verify": True}
    found = parser.parse_args(["photos", "--verify", "false", "--overwrite", "true"])
    assert (found.source, found.verify, found.overwrite) == ("photos", False, True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--mean 123 117 104", "--mean 0.482 0.459 0.408"),
        ("--teacher-temp 7", "--teacher-temp 7.0 must be above 0 and at most 1"),
        ("--weight-decay -1", "--weight-decay -1.0 must be between 0 and 1"),
        ("--seed 99999999999999999999", "does not fit in 64 bits"),
        ("--adam-beta2 1", "--adam-beta2 1.0 must be between 0 and 1"),
        ("--max-hours inf", "inf is not a finite number"),
        ("--clip-grad nan", "nan is not a finite number"),
        ("--resume {tmp}", "--resume auto"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    given: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = refused(f"--data x {given.format(tmp=tmp_path)}", capsys)
    assert said in line


def test_a_rate_far_above_the_published_is_called_that() -> None:
    (note,) = parse(["--data", "x", "--lr", "5000"]).notes
    assert "--lr 5000 is far above" in note


def test_home_folders_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    paths = "--data ~/d.beton --output-dir ~/o --init-from ~/i.pt --eval-train ~/t --eval-val ~/v"
    found = parse(paths.split()).resolved()
    names = ("output_dir", "init_from", "eval_train", "eval_val")
    assert [found[name] for name in names] == [
        f"/home/someone/{name}" for name in ("o", "i.pt", "t", "v")
    ]
    assert found["data"] == ("/home/someone/d.beton",)
    assert parse(["--data", "x", "--resume", "~/c.pt"]).run.resume == "/home/someone/c.pt"


def saved(config: Config, path: Path) -> Path:
    path.write_text(json.dumps(config.resolved()))
    return path


def test_a_saved_configuration_starts_the_same_run_elsewhere(tmp_path: Path) -> None:
    line = "--data x --arch vit_b --epochs 5 --lr 1e-3 --pred-ratio 0.1 0.3 --seed 7"
    first = parse(line.split())
    path = saved(first, tmp_path / "config.json")
    second = parse(["--config", str(path), "--output-dir", str(tmp_path / "other")])
    expected = first.resolved() | {"output_dir": str(tmp_path / "other")}
    assert second.resolved() == expected
    assert parse(["--config", str(tmp_path)]).model == first.model, "its folder will do"


def test_a_saved_configuration_keeps_its_recipe_unless_another_architecture_is_given(
    tmp_path: Path,
) -> None:
    first = parse(["--data", "x", "--recipe", "vit_b_rand", "--lr", "1e-3"])
    path = str(saved(first, tmp_path / "config.json"))
    again = parse(["--config", path, "--output-dir", "runs/b"])
    assert "recipe vit_b_rand with --output-dir runs/b, --lr 0.001, --data x;" in again.summary()
    other = parse(["--config", path, "--arch", "vit_s"])
    assert "recipe vit_s with" in other.summary()
    assert other.run.output_dir == "runs/vit_s"


def test_options_override_a_saved_configuration(tmp_path: Path) -> None:
    first = parse(["--data", "x", "--global-batch-size", "64", "--global-crops-size", "160"])
    path = str(saved(first, tmp_path / "config.json"))
    again = parse(["--config", path, "--lr", "1e-3", "--global-crops-size", "128"])
    assert (again.run.lr, again.run.global_batch_size) == (1e-3, 64)
    assert again.model.image_size == 128, "the position table follows the views"
    fewer = parse(["--config", path, "--batch-size", "8"])
    assert (fewer.run.global_batch_size, fewer.pipeline.batch_size) == (0, 8)


def test_configurations_that_cannot_be_read_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        read_preset(str(path))
    path.write_text("[1, 2")
    with pytest.raises(ValueError, match=r"is not the config\.json of a run \("):
        read_preset(str(path))
    path.write_bytes(b"\x80not text")
    with pytest.raises(ValueError, match=r"is not the config\.json of a run$"):
        read_preset(str(path))
    path.write_text('{"epochs": 3, "speed": 11}')
    with pytest.raises(ValueError, match="unknown setting speed"):
        read_preset(str(path))
    path.write_text('{"data": "x", "epochs": "many", "mean": [1.0], "lr": NaN}')
    with pytest.raises(ValueError, match="--epochs 'many': expected an integer") as error:
        parse(["--config", str(path)])
    assert "--lr nan: expected a finite number" in str(error.value)
    with pytest.raises(ValueError, match="--config and --recipe"):
        parse(["--config", str(path), "--recipe", "vit_s"])


def test_a_configuration_of_before_in_chans_was_removed_still_loads(tmp_path: Path) -> None:
    old = from_values({"data": "x"}).resolved() | {"in_chans": 3}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert parse(["--config", str(tmp_path)]).pipeline.data == ("x",)
    (tmp_path / "config.json").write_text(json.dumps(old | {"in_chans": 4}))
    with pytest.raises(ValueError, match="unknown setting in_chans"):
        parse(["--config", str(tmp_path)])


def test_the_start_of_the_log_names_what_differs_from_the_recipe() -> None:
    said = parse(
        ["--data", "x.beton", "--arch", "vit_b", "--lr", "1e-3", "--output-dir", "runs/b"]
    ).summary()
    assert said == (
        "recipe vit_b with --output-dir runs/b, --lr 0.001, --data x.beton;"
        " all settings: runs/b/config.json"
    )


def test_beta2_is_a_setting_and_not_part_of_the_state() -> None:
    import torch

    student = torch.nn.Linear(3, 2)
    first, second = (build_optimizer(student, "adamw", beta2=beta) for beta in (0.999, 0.95))
    load_optimizer_state(second, first.state_dict())
    assert [group["betas"] for group in second.param_groups] == [(0.9, 0.95)] * 2
