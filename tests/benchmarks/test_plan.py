"""ibeton plan: its arithmetic, and what was measured and published."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ibeton.benchmarks.harness.plan_devices import DEVICES, STEP, STEP_GFLOP, loader_rate
from ibeton.benchmarks.plan import arguments, main, planned, step_gflop
from ibeton.model import build
from ibeton.training.config import from_values
from ibeton.training.timing.flops import flop_counter


def plan(line: str) -> dict[str, Any]:
    return planned(*arguments(line.split()))


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    return plan("--arch vit_s --epochs 800 --gpu v100 --gpus 16 --cores-per-gpu 5")


def within(value: float, pair: list[float]) -> bool:
    return min(pair) <= value <= max(pair)


def test_operations_are_those_that_run() -> None:
    small = {
        **{"arch": "vit_t", "embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8},
        **{"global_crops_size": 64, "local_crops_size": 32, "local_crops_number": 3},
        **{"out_dim": 96, "hidden_dim": 80, "bottleneck_dim": 40, "drop_path": 0.0},
        **{"data": "unused", "pred_ratio": (0.25,), "pred_ratio_var": (0.0,)},
    }
    config = from_values(small)
    found = step_gflop(config)
    masks = torch.zeros(2, 4, 8, 8, dtype=torch.bool)
    masks[:, :, :2] = True
    views = torch.randn(2, 4, 3, 64, 64), torch.randn(3, 4, 3, 32, 32)
    with flop_counter() as counter:
        build(config.model)(*views, masks, 0)[0]["loss"].backward()
    assert found == pytest.approx(counter.get_total_flops() / 4 / 1e9, rel=0.05)


def test_the_measured_steps_lie_in_the_range() -> None:
    """963 and 1,182 images/s of one H100, ViT-S, fp16, batch 64 and 256; 420 of the published
    trainer's loop at 64; 6.1 GiB at the peak."""
    base = plan("--gpu h100 --cores-per-gpu 16 --batch-size 64")
    assert base["gflop_per_image"] == pytest.approx(STEP_GFLOP, rel=0.05)
    assert within(STEP.images_per_s, base["model_images_per_s"])
    assert within(1182, plan("--gpu h100 --batch-size 256")["model_images_per_s"])
    assert within(420, plan("--gpu h100 --published")["model_images_per_s"])
    assert sum(base["memory"].values()) == pytest.approx(STEP.gib * 2**30, rel=1e-6)


def test_the_published_run_of_ibot_lies_in_the_range() -> None:
    """193 h for 800 epochs on 16 V100s (arXiv 2404.00509)."""
    found = plan("--published --epochs 800 --gpu v100 --gpus 16 --cores-per-gpu 5")
    assert within(193, found["hours"])


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
    half = plan("--arch vit_s --epochs 800 --gpu v100 --gpus 8 --cores-per-gpu 5")
    assert half["images_per_s"][0] == pytest.approx(slow / 2)


def test_memory_grows_with_the_batch_and_shards_share_the_moments() -> None:
    one, two = (plan(f"--gpu v100 --gpus 8 --batch-size {n}")["memory"] for n in (64, 128))
    assert two["activations"] == pytest.approx(2 * one["activations"])
    assert two["fixed"] == one["fixed"]
    sharded = plan("--gpu v100 --gpus 8 --batch-size 64 --shard-optimizer")["memory"]
    assert sharded["fixed"] < one["fixed"]


def test_the_pil_loader_starves_a_gpu_and_more_cores_feed_it() -> None:
    few, many = (plan(f"--gpu a100 --loader pil --cores-per-gpu {cores}") for cores in ("4", "8"))
    assert few["limit"] == ["loader", "loader"]
    assert many["images_per_s"][0] == pytest.approx(2 * few["images_per_s"][0])


def test_crops_cost_by_their_pixels_and_decodes_do_not() -> None:
    whole = loader_rate("published", 2 * 224**2 + 10 * 96**2)
    assert whole == pytest.approx((18, 23))
    none = loader_rate("published", 0)
    assert none[1] == pytest.approx(410)
    half = loader_rate("published", (2 * 224**2 + 10 * 96**2) // 2)
    assert 1 / half[1] == pytest.approx((1 / 23 + 1 / 410) / 2, rel=0.01)


def test_the_command_shows_a_range_and_where_it_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"--gpu v100 --gpus 16 --json {tmp_path}/new/plan.json"
    assert main(line.split()) == 0
    said = capsys.readouterr().out
    assert "slow" in said
    assert "Scaled from one measured step" in said
    assert "to be measured" in said
    assert max(map(len, said.split("Memory of a GPU")[0].splitlines())) <= 80
    found = json.loads((tmp_path / "new" / "plan.json").read_text())
    assert found["images_per_s"][0] < found["images_per_s"][1]
    assert all(device.source for device in DEVICES.values())


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("--arch vit_s", "--gpu"),
        ("--gpu v1000", "--gpu"),
        ("--gpu v100 --gpus 0", "--gpus"),
        ("--gpu v100 --precision bf16", "--precision bf16"),
        ("--gpu v100 --arch swin_t7", "--arch swin_t7"),
        ("--gpu v100 --loader dali", "--loader dali"),
        ("--gpu v100 --nonsense 1", "--nonsense"),
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
