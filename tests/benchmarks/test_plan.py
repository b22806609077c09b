"""ibeton plan: its arithmetic, and what was measured and published."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ibeton.benchmarks.harness.budget_launches import Settings, step_launches
from ibeton.benchmarks.harness.budget_rates import DEVICES, predicted_seconds
from ibeton.benchmarks.plan import FASTER, ROOM, SLOWER, arguments, main, planned
from ibeton.training.config import parse


def plan(line: str) -> dict[str, Any]:
    return planned(*arguments(line.split()))


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    return plan("--arch vit_t --depth 2 --epochs 800 --gpu v100 --gpus 16 --cores-per-gpu 50")


def within(value: float, pair: list[float]) -> bool:
    return min(pair) <= value <= max(pair)


@pytest.mark.slow
def test_the_measured_steps_lie_in_the_range() -> None:
    """2,017 and 2,199 images/s of one H100, ViT-S, fp16, batch 64 and 256; 420 of the published
    trainer's loop at 64; 8.4 and 16.2 GiB at the peak."""
    base = plan("--gpu h100 --cores-per-gpu 16 --batch-size 64 --recompute off")
    assert within(2017, base["model_images_per_s"])
    assert within(2199, plan("--gpu h100 --batch-size 256")["model_images_per_s"])
    published = plan("--gpu h100 --published")
    assert within(420, published["model_images_per_s"])
    for found, peak in ((base, 8.43), (published, 16.2)):
        assert found["weights"] + ROOM * found["activations"] == pytest.approx(
            peak * 2**30, rel=0.1
        )


def test_the_published_run_of_ibot_lies_in_the_range() -> None:
    """193 h for 800 epochs on 16 V100s (arXiv 2404.00509)."""
    found = plan("--published --epochs 800 --gpu v100 --gpus 16 --cores-per-gpu 5")
    assert within(193, found["hours"])


@pytest.mark.slow
def test_the_published_run_of_dino_lies_in_the_range() -> None:
    """0.617 s per step of 64 images on 8 V100s, 2 x 224 + 8 x 96 (issue 69 of its repository)."""
    found = plan("--published --local-crops-number 8 --gpu v100 --gpus 8 --cores-per-gpu 5")
    assert within(0.617, [64 * 8 / rate for rate in found["images_per_s"]])


def test_figures_follow_from_each_other(ours: dict[str, Any]) -> None:
    assert ours["limit"] == ["model", "model"]
    slow, fast = ours["images_per_s"]
    assert slow < fast
    for hours, rate in zip(ours["hours"], (slow, fast), strict=True):
        assert hours == pytest.approx(1281167 * 800 / rate / 3600)
    assert ours["page_cache"] == pytest.approx(1281167 * 108e3)
    half = plan("--arch vit_t --depth 2 --epochs 800 --gpu v100 --gpus 8 --cores-per-gpu 50")
    assert half["images_per_s"][0] == pytest.approx(slow / 2)


def test_measured_steps_correct_the_plan_also_for_another_gpu(ours: dict[str, Any]) -> None:
    small = "--arch vit_t --depth 2 --epochs 800 --cores-per-gpu 50"
    predicted = plan(f"{small} --gpu h100")["model_images_per_s"][1] / FASTER
    half = plan(f"{small} --gpu h100 --measured h100={predicted / 2}")
    assert half["model_images_per_s"] == pytest.approx([predicted / 2] * 2)
    moved = plan(f"{small} --gpu v100 --gpus 16 --measured h100={predicted / 2}")
    slow, fast = moved["model_images_per_s"]
    assert fast == pytest.approx(ours["model_images_per_s"][1] / FASTER / 2)
    assert slow == pytest.approx(fast / SLOWER)


@pytest.mark.slow
def test_memory_grows_with_the_batch_and_shards_share_the_moments() -> None:
    small = "--published --arch vit_t --depth 2 --gpu v100 --gpus 8"
    one, two = (plan(f"{small} --batch-size {n}") for n in (8, 16))
    assert 1.6 * one["activations"] < two["activations"] < 2 * one["activations"], "weights too"
    assert two["weights"] == one["weights"]
    sharded = plan(f"{small} --batch-size 8 --shard-optimizer")
    assert sharded["weights"] < one["weights"]
    halves = plan(f"{small} --batch-size 16 --micro-steps 2")
    assert halves["activations"] == one["activations"]


def test_the_pil_loader_starves_a_gpu_and_more_cores_feed_it() -> None:
    small = "--arch vit_t --depth 2 --gpu a100 --loader pil"
    few, many = (plan(f"{small} --cores-per-gpu {cores}") for cores in ("4", "8"))
    assert few["limit"] == ["loader", "loader"]
    assert many["images_per_s"][0] == pytest.approx(2 * few["images_per_s"][0])


def test_the_command_shows_a_range_and_where_it_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"--arch vit_t --depth 2 --gpu v100 --gpus 16 --json {tmp_path}/new/plan.json"
    assert main(line.split()) == 0
    said = capsys.readouterr().out
    assert "slow" in said
    assert "rates fitted to one H100" in said
    assert max(map(len, said.split("Memory of a GPU")[0].splitlines())) <= 80
    found = json.loads((tmp_path / "new" / "plan.json").read_text())
    assert found["images_per_s"][0] < found["images_per_s"][1]


def test_the_percentages_of_the_published_trainer_agree_with_its_range(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = "--published --arch vit_t --depth 2 --gpu v100"
    found = plan(line)
    slow, fast = found["model_images_per_s"]
    assert main(line.split()) == 0
    said = re.search(
        r"takes ([0-9.]+) times .* Slow: (\d+)% .* Fast: (\d+)%", capsys.readouterr().out
    )
    assert said
    factor, most, least = map(float, said.groups())
    assert fast / slow == pytest.approx(most / least, rel=0.01)
    step = step_launches(
        Settings(parse([*line.split()[1:5], "--data", "x"]).model, 64, kernels=False)
    )
    seconds = predicted_seconds(step, DEVICES["v100"])
    assert 64 / slow == pytest.approx(most / 100 * factor * seconds, rel=0.01)


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("--arch vit_s", "--gpu"),
        ("--gpu v1000", "--gpu"),
        ("--gpu v100 --gpus 0", "--gpus"),
        ("--gpu v100 --precision bf16", "--precision bf16"),
        ("--gpu h100 --precision fp32", "--precision fp32"),
        ("--gpu v100 --arch swin_t7", "--arch swin_t7"),
        ("--gpu v100 --loader dali", "--loader dali"),
        ("--gpu v100 --nonsense 1", "--nonsense"),
        ("--gpu v100 --measured h100", "--measured"),
        ("--gpu v100 --measured h100=0", "--measured"),
        ("--gpu v100 --measured t4=100", "--measured"),
        ("--gpu v100 --measured h100=100 --published", "--published"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    capsys: pytest.CaptureFixture[str], line: str, names: str
) -> None:
    try:
        status = main(line.split())
    except SystemExit as stop:  # argparse's way
        status = int(stop.code or 0)
    assert status == 2
    assert names in capsys.readouterr().err.strip().splitlines()[-1]
