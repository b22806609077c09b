"""--recipe small: what follows from the photos and the device."""

from pathlib import Path

import pytest
from small_runs import Start

from ibeton.training.config import from_values, parse
from ibeton.training.small import recipe_for


def settings(photos: int, side: int, on_gpu: bool) -> dict[str, object]:
    """All settings of a run by this recipe: it must pass the checks of every option."""
    return from_values({"data": "unused", **recipe_for(photos, side, on_gpu)}).resolved()


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("side", [20, 32, 100, 4000])
@pytest.mark.parametrize("photos", [1_000, 10_000, 300_000])
def test_the_recipe_is_sound_for_any_number_and_size_of_photos(
    photos: int, side: int, on_gpu: bool
) -> None:
    found = settings(photos, side, on_gpu)
    assert found["warmup_epochs"] == found["warmup_teacher_temp_epochs"] >= 1
    seen = 6_400_000 if on_gpu else 640_000
    assert 5 <= found["epochs"] <= 800
    if 5 < found["epochs"] < 800:
        assert found["epochs"] * photos == pytest.approx(seen, rel=0.15)


def test_it_is_what_was_measured_on_cifar10() -> None:
    found = settings(10_000, 32, False)
    line = (
        "--data unused --arch vit_t --embed-dim 128 --depth 4 --num-heads 4 --patch-size 8"
        " --drop-path 0 --global-crops-size 32 --global-crops-scale 0.5 1 --local-crops-number 0"
        " --blur-radius 0.1 0.5 --color-jitter 0.4 0.4 0.9 0.5 --gray-p 0.4 --batch-size 64"
        " --epochs 64 --warmup-epochs 2 --lr 4e-3 --min-lr 1e-5 --momentum-teacher 0.99"
        " --weight-decay-end 0.1 --out-dim 512 --hidden-dim 256 --bottleneck-dim 64"
        " --warmup-teacher-temp-epochs 2 --warmup-teacher-temp 0.015 --teacher-temp 0.015"
        " --warmup-teacher-patch-temp 0.015 --teacher-patch-temp 0.015"
        " --precision fast --recompute off"
    )
    assert found == parse(line.split()).resolved()


def test_it_looks_at_the_photos_and_options_override_it(tiny_folder: Path, tiny: Path) -> None:
    for data in (tiny_folder, tiny):  # 64 photos of 48 x 40 pixels
        line = ["--data", str(data), "--recipe", "small", "--device", "cpu", "--lr", "1e-3"]
        config = parse(line)
        assert (config.run.recipe, config.run.lr) == ("small", 1e-3)
        assert (config.run.epochs, config.model.patch_size, config.model.image_size) == (800, 8, 32)
        assert config.run.output_dir == "runs/small"
        assert config.summary() == (
            f"recipe small with --output-dir runs/small, --device cpu, --lr 0.001, --data {data};"
            " all settings: runs/small/config.json"
        )


def test_a_run_by_the_recipe_starts_and_steps(start: Start, tmp_path: Path) -> None:
    line = ["--recipe", "small", "--device", "cpu", "--workers", "1", "--stop-after", "1"]
    run = start(tmp_path / "run", small=line)
    assert run.wait() == 0, run.said()[-2000:]
    assert "recipe small with" in run.said()
    assert len(run.log().splitlines()) == 1


def test_photos_that_are_not_there_are_named() -> None:
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        parse(["--data", "/nowhere", "--recipe", "small"])
    with pytest.raises(ValueError, match="--data is missing"):
        parse(["--recipe", "small"])
