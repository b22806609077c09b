"""What a run says of itself before its first step."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibeton.pipeline.convert.converter import ConvertOptions, convert
from ibeton.pipeline.loaders import LOADERS
from ibeton.train import prepare
from ibeton.training.config import parse
from ibeton.training.forecast import preflight as lines
from ibeton.training.forecast.photo_cost import photo_cost
from ibeton.training.forecast.preflight import (
    cache_line,
    cpu_line,
    disk_line,
    duration,
    gpu_line,
    preflight,
    time_line,
)
from ibeton.training.forecast.projection import Forecast, LoaderCost, forecast, hours
from ibeton.training.run import Run

GIB = 2**30
SMALL = shlex.split(
    "--arch vit_t --embed-dim 32 --depth 2 --num-heads 2 --patch-size 8 --global-crops-size 32"
    " --local-crops-size 16 --local-crops-number 2 --batch-size 4 --out-dim 64 --hidden-dim 32"
    " --bottleneck-dim 16 --workers 1 --device cpu --loader pil --epochs 100 --keep-every 10"
)


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 small photos."""
    root = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    (root / "photos").mkdir()
    for i in range(24):
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "photos" / f"{i}.jpg")
    convert(root / "photos", root / "photos.beton", ConvertOptions(workers=1))
    return root / "photos.beton"


def made_ready(data: Path, folder: Path, *options: str) -> Run:
    return prepare(parse([*SMALL, "--data", str(data), "--output-dir", str(folder), *options]))


def told(text: str) -> dict[str, str]:
    """The lines by what they are about."""
    rows = [line.strip() for line in text.splitlines()[1:]]
    return {name: row[len(name) :].strip() for row in rows for name in ABOUT if name in row[:12]}


ABOUT = ("memory", "page cache", "disk", "time")


def test_a_run_tells_whether_it_fits_how_long_it_takes_and_what_limits(
    beton: Path, tmp_path: Path
) -> None:
    run = made_ready(beton, tmp_path / "not" / "there")
    said = told(preflight(run, None))
    run.loader.close()
    assert set(said) == set(ABOUT)
    assert "fits" in said["memory"]
    assert "read from disk once" in said["page cache"]
    assert "(13 kept)" in said["disk"], "ten that stay, three that roll"
    assert "images/s" in said["time"]
    assert "will limit" in said["time"]
    assert not (tmp_path / "not").exists(), "it only looks"


def test_a_folder_of_photos_is_weighed_by_some_of_them(beton: Path, tmp_path: Path) -> None:
    photos = beton.parent / "photos"
    run = made_ready(photos, tmp_path)
    cost = lines.PreflightInputs(run, None).cost
    run.loader.close()
    sizes = [path.stat().st_size for path in photos.iterdir()]
    assert cost.stored == pytest.approx(np.mean(sizes), rel=0.1)
    assert cost.decoded == 40 * 48 * 3


def test_what_cannot_be_told_is_called_unknown(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_ready(beton, tmp_path)

    def unreadable() -> float:
        raise FileNotFoundError("no /proc here")

    monkeypatch.setattr(lines, "available_memory", unreadable)
    said = told(preflight(run, None))
    run.loader.close()
    assert said["memory"] == said["page cache"] == "unknown: no /proc here"
    assert "fits" in said["disk"], "the others are told"
    assert "will limit" in said["time"]


def test_swin_is_told_what_does_not_hang_on_the_step(beton: Path, tmp_path: Path) -> None:
    swin = ["--arch", "swin_t7", "--patch-size", "32", "--embed-dim", "96"]
    options = ["--data", str(beton), "--output-dir", str(tmp_path), "--device", "cpu"]
    run = prepare(parse([*swin, *options, "--loader", "pil", "--batch-size", "4"]))
    said = told(preflight(run, None))
    run.loader.close()
    assert "only ViTs are estimated" in said["memory"]
    assert "only ViTs are estimated" in said["time"]
    assert "fits" in said["disk"]


def test_a_batch_too_large_is_told_the_largest() -> None:
    def need(images: int) -> float:
        return 2.0 * GIB + images * 0.1 * GIB

    assert "fits; the largest batch is about 140" in gpu_line(need, 64, 16.05 * GIB)
    too_large = gpu_line(need, 200, 16.05 * GIB)
    assert "22 GiB of the GPU's 16.1 GiB" in too_large
    assert "will not fit; the largest batch is about 140" in too_large


def test_main_memory_is_told_with_what_an_allocator_keeps() -> None:
    fits = cpu_line(4 * GIB, 64, 9 * GIB)
    assert fits == "4 GiB to 8 GiB more for 64 images, of 9 GiB free: fits"
    assert cpu_line(4 * GIB, 64, 6 * GIB).endswith("may not fit; give a smaller --batch-size")
    assert cpu_line(4 * GIB, 64, 3 * GIB).endswith("will not fit; give a smaller --batch-size")


def test_lines_on_cache_and_disk() -> None:
    assert "64 GiB of memory free: read from disk once" in cache_line(50 * GIB, 64 * GIB)
    assert "every epoch reads from disk" in cache_line(129 * GIB, 64 * GIB)
    assert disk_line(2 * GIB, 9, 20 * GIB).endswith("20 GiB free: fits"), "nine, and one partial"
    assert "will not fit" in disk_line(2 * GIB, 10, 20 * GIB)


def test_hours_follow_from_the_slower_side() -> None:
    low = Forecast(80.0, {"model": 100.0, "loader": 80.0})
    high = Forecast(125.0, {"model": 200.0, "loader": 125.0})
    line = time_line(3_600_000 * 16, low, high, processes=16)
    assert line.startswith("6.4 h to 15.6 h (1.02e+03 to 2.5e+03 images/s)")
    assert "the loader will limit" in line
    assert hours(1_281_167 * 800, 16 * 92) == pytest.approx(193, rel=0.01), "iBOT's own run"


@pytest.mark.parametrize(("time", "words"), [(0.25, "15 min"), (3.5, "3.5 h"), (72, "3 days")])
def test_durations_have_a_unit_that_suits(time: float, words: str) -> None:
    assert duration(time) == words


def test_cores_are_shared_where_the_model_has_no_gpu(beton: Path, tmp_path: Path) -> None:
    run = made_ready(beton, tmp_path)
    shape = lines.PreflightInputs(run, None).shape()
    run.loader.close()
    rates = lines.measured_rates(shape, torch.device("cpu"), None)[0]
    cost = LoaderCost(decode=0.1, crop=0.3)
    apart = forecast(shape, rates, cost, workers=2, cores=2)
    assert apart.sides["loader"] == pytest.approx(2 / 0.4)
    shared = forecast(shape, rates, cost, workers=2, cores=2, threads=2)
    model = 1 / apart.sides["model"]
    assert shared.sides["cores"] == pytest.approx(2 / (2 * model + 0.4))
    assert shared.limit == "cores"
    assert forecast(shape, rates, cost, workers=1, cores=2).sides["loader"] == 1 / 0.4


def test_cuts_cost_nothing_where_a_gpu_makes_them(beton: Path, tmp_path: Path) -> None:
    run = made_ready(beton, tmp_path)
    config, photos = run.config.pipeline, run.loader.photos
    here, there = (photo_cost(photos, config, LOADERS["pil"], cut).loader for cut in (True, False))
    run.loader.close()
    assert there.crop == 0 < here.crop
    assert min(here.decode, there.decode) > 0
