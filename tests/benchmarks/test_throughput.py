"""benchmarks/throughput.py as people run it, small."""

import html
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from small_runs import SMALL_MODEL, Ticks, noise_beton, with_a_slow_rank

from ibeton import stages, train
from ibeton.benchmarks.harness.throughput_bench import Bench
from ibeton.benchmarks.harness.throughput_report import print_report, rows
from ibeton.benchmarks.throughput import draw_photos, main
from ibeton.model import IBOT
from ibeton.pipeline import PipelineConfig
from ibeton.pipeline.loaders import LOADERS
from ibeton.pipeline.store.beton import BetonReader
from ibeton.training.timing.speed import WAITING

SMALL = [*SMALL_MODEL, "--batch-size", "2", "--loader", "pil"]


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_beton(tmp_path_factory.mktemp("noise"), 60)


@pytest.fixture(scope="module")
def report(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report."""
    folder = tmp_path_factory.mktemp("report")
    options = ["--rounds", "2", "--steps", "1", "--baseline", "--report", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(train, "spread")  # what train.py does for its log alone is no part of a step
        assert main([*SMALL, "--data", str(beton), *options]) == 0
    return folder


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "throughput.json").read_text())


@pytest.mark.parametrize("batch", [3, 8])
def test_as_many_photos_are_drawn_as_the_turns_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = [*SMALL, "--batch-size", str(batch), "--workers", "3"]
    photos = BetonReader(draw_photos(tmp_path, options, steps=1, baseline=False))
    assert len(photos) >= 2 * batch * (3 + 18)


def test_whole_bursts_of_worker_processes_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five workers make a batch each in five seconds, all at once."""
    ticks, workers = Ticks(), 5
    monkeypatch.setattr(stages, "time", ticks)

    class Bursts:
        steps_per_epoch, photos, kind = 100, [], LOADERS["pil"]

        def epoch(self, number: int, first_step: int) -> Iterator[None]:
            for step in range(first_step, self.steps_per_epoch):
                ticks.now += 5.0 if (step - first_step) % workers == 0 else 0.0
                yield None

        def discard_ahead(self) -> None:
            pass

    bench = Bench.__new__(Bench)  # without a run of a model
    loader, device = Bursts(), torch.device("cpu")
    config = SimpleNamespace(pipeline=PipelineConfig(workers=workers))
    bench.run = SimpleNamespace(loader=loader, device=device, config=config)  # type: ignore[assignment]
    bench.steps, bench.images, bench.clock, bench.windows = 1, 2, stages.StageClock(device), {}
    bench.loader("loader", loader)  # type: ignore[arg-type]
    assert bench.windows["loader"][0].images_per_s == pytest.approx(2.0, rel=1e-3)


def test_every_side_has_a_rate_a_round(report: Path) -> None:
    rates = result(report)["images_per_s"]
    own = {"loader", "model", "both"}
    assert set(rates) == own | {"published loader", "plain model"}
    assert all(len(side) == 2 and min(side) > 0 for side in rates.values())


def test_the_stages_add_up_to_the_step(report: Path) -> None:
    measured = result(report)
    by_round = np.sum(list(measured["step_ms"].values()), axis=0)
    step = 1000 * measured["run"]["batch_size"] / np.array(measured["images_per_s"]["both"])
    np.testing.assert_allclose(by_round, step, rtol=1e-6)
    stages = {"wait", "copy", "mask", "teacher", "student", "loss", "backward", "optimizer", "ema"}
    assert stages <= set(measured["step_ms"])
    assert "comm" not in measured["step_ms"], "one process waits for no other"
    assert set(measured["loader_ms"]) == {"read", "decode", "crop"}


def test_table_and_verdict_speak_of_the_same_round(report: Path) -> None:
    measured, middle = result(report), result(report)["middle_round"]
    found = [row for row in rows(measured) if not row.beside]
    step = 1000 * measured["run"]["batch_size"] / measured["images_per_s"]["both"][middle]
    assert sum(row.middle for row in found) == pytest.approx(step)
    assert sum(row.share or 0 for row in found) == pytest.approx(1)
    verdict = " ".join(measured["verdict"])
    shares = {row.name: row.share for row in found}
    for stage, share in re.findall(r"(\w+) takes (\d+)% of the step", verdict):
        assert shares[stage] == pytest.approx(int(share) / 100, abs=0.006)
    for share in re.findall(r"Data wait (\d+)%", verdict):  # on a busy machine
        waiting = sum(shares.get(name) or 0 for name in WAITING)
        assert waiting == pytest.approx(int(share) / 100, abs=0.006)
    rate = measured["images_per_s"]["both"][middle]
    assert f"Both together give {rate:.4g} images/s" in verdict


def test_the_report_fits_80_columns_and_a_narrow_page(
    report: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = result(report)
    measured["verdict"] = []
    # Figures of a slow machine, whatever this one is.
    for ms in (*measured["step_ms"].values(), *(v["ms"] for v in measured["loader_ms"].values())):
        ms[:] = [101_234.5, 98_765.4]
    measured["floor_ms"] = dict.fromkeys(measured["floor_ms"], 12.345)
    measured["images_per_s"] = {name: [0.0012345, 1234.5] for name in measured["images_per_s"]}
    print_report(measured, Console(width=80, highlight=False))
    table = capsys.readouterr().out.split("The clock:")[0]
    assert "… " not in table
    lines = table.splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines)
    assert sum(line.lstrip().startswith(("teacher", "backward", "step ")) for line in lines) == 3
    assert "pre { overflow-x: auto;" in (report / "throughput.html").read_text()


def test_floors_are_there_for_what_has_one(report: Path) -> None:
    floor = result(report)["floor_ms"]
    expected = {"decode", "crop", "copy", "teacher", "student", "loss", "backward", "optimizer"}
    assert set(floor) == expected | {"ema", "graph"}
    assert min(floor.values()) > 0
    assert floor["backward"] > floor["student"], "a backward is twice the forward"
    assert floor["graph"] == pytest.approx(sum(floor[name] for name in stages.GRAPHED))


def test_picture_and_page_are_left(report: Path) -> None:
    assert Image.open(report / "throughput.png").size[0] > 1000
    page = (report / "throughput.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page, "it opens offline"
    verdict = result(report)["verdict"]
    assert any("Both together give" in line for line in verdict)
    assert all(html.escape(line) in page for line in verdict)


@pytest.mark.slow
def test_a_slow_stage_is_its_verdict_and_its_images_per_s_are_those_of_train(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks, update = Ticks(), IBOT.update_teacher

    def slow(*arguments: Any) -> None:
        ticks.now += 1.0
        update(*arguments)

    monkeypatch.setattr(IBOT, "update_teacher", slow)
    monkeypatch.setattr(stages, "time", ticks)
    data, report = ["--data", str(beton)], ["--rounds", "2", "--steps", "3"]
    assert main([*SMALL, *data, *report, "--report", str(tmp_path)]) == 0
    measured = result(tmp_path)
    first = measured["verdict"][0]
    assert first.startswith("The model limits: ema takes 100% of the step")
    assert "times its floor; at the floor the step would give" in first
    run = ["--stop-after", "5", "--log-steps", "100"]
    assert train.main([*SMALL, *data, *run, "--output-dir", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    for both in measured["images_per_s"]["both"]:
        assert both == pytest.approx(record["images_per_s"], rel=1e-3)
    assert record["images_per_s"] == pytest.approx(2.0, rel=1e-3), "a batch of two a second"


@pytest.mark.slow
def test_a_slow_loader_is_its_verdict(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ibeton.pipeline.loaders.pil import PilCrops

    batches = PilCrops.stream

    def slow(*arguments: Any) -> Iterator[Any]:
        for crops in batches(*arguments):
            time.sleep(0.5)
            yield crops

    monkeypatch.setattr(PilCrops, "stream", slow)
    options = ["--data", str(beton), "--rounds", "1", "--steps", "2", "--report", str(tmp_path)]
    assert main([*SMALL, *options]) == 0
    first, second, _ = result(tmp_path)["verdict"]
    assert first.startswith("Data wait")
    assert "no stage of the loader limits" in first
    assert "of what the loader alone does, the slower of the two" in second


@pytest.mark.slow
def test_each_of_two_processes_has_its_figures_and_the_slow_one_is_named(
    beton: Path, tmp_path: Path
) -> None:
    options = ["--batch-size", "1", "--rounds", "1", "--steps", "2", "--report", str(tmp_path)]
    arguments = [*SMALL, "--data", str(beton), *options]
    done = with_a_slow_rank("ibeton.benchmarks.throughput", tmp_path, *arguments)
    measured = result(tmp_path)
    first, second = measured["ranks"]
    assert second["ema"] >= 1000 > 500 > first["ema"]
    assert first["comm"] > 500 > second["comm"]
    together, slow = measured["verdict"][-2:]
    assert f"2 processes give {2 * measured['images_per_s']['both'][0]:.4g} images/s" in together
    assert slow.startswith("Rank 1 is the slowest")
    assert "ema" in slow
    assert "comm is waiting for others" in (tmp_path / "throughput.html").read_text()
    assert done.stdout.count("Both together give") == 1, "rank 0 alone speaks"


@pytest.mark.parametrize(("rounds", "found"), [(4, "ema, ms per step."), (2, "nothing.")])
def test_compare_names_what_changed_beyond_noise(
    report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rounds: int, found: str
) -> None:
    measured = result(report)
    for ms in measured["step_ms"].values():
        ms[:] = [101_234.5, 98_765.4, 0.0123, 1.1][:rounds]  # wide, and wide apart
    measured["step_ms"]["ema"] = [1.0, 1.2, 1.1, 1.3][:rounds]
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps(measured))
    measured["step_ms"]["ema"] = [50 * ms for ms in measured["step_ms"]["ema"]]
    after.write_text(json.dumps(measured))
    assert main(["--compare", str(before), str(after)]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = " ".join(" ".join(lines).split())
    assert f"Beyond noise: {found}" in said
    assert f"before: {before} after: {after}" in said
    assert all(len(line.rstrip()) <= 80 for line in lines[2:])
    stages = len(measured["step_ms"]) + len(measured["loader_ms"])
    table = lines[next(i for i, line in enumerate(lines) if "ms per step" in line) + 2 :]
    assert all(line.strip() for line in table[:stages]), "no row is broken"
    assert not table[stages].strip()


def test_compare_shows_stages_of_one_report_only(
    report: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    measured = result(report)
    wide = [101_234.5, 98_765.4, 0.0123, 98_000.0]
    paths = tmp_path / "before.json", tmp_path / "after.json"
    for path, name, factor in zip(paths, ("gone", "new"), (1, 40), strict=True):
        changed = [factor * ms for ms in (1.0, 1.2, 1.1, 1.3)]
        steps = {**measured["step_ms"], "ema": changed, name: wide}
        path.write_text(json.dumps({**measured, "step_ms": steps}))
    assert main(["--compare", *map(str, paths)]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert next(x for x in lines if x.startswith(" gone ")).endswith(" only before")
    assert next(x for x in lines if x.startswith(" new ")).endswith(" only after")
    assert next(x for x in lines if x.startswith(" ema ")).endswith(" changed 40.000")
    assert all(len(line) <= 80 for line in lines[2:])


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("--compare {data} nowhere.json", "photos.beton is not what"),
        ("--compare nowhere.json {data}", "nowhere.json does not exist"),
        ("--data nowhere.beton", "nowhere.beton"),
        ("--data {data} --steps 100", "fewer --steps"),
        ("--data {data} --batch-size 30", "more photos or a smaller --batch-size or fewer --work"),
        ("--data {data} --rounds 0", "--rounds"),
        ("--data {data} --arch vit_z", "--arch"),
        ("--nonsense 1 --data {data}", "--nonsense"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    beton: Path, capsys: pytest.CaptureFixture[str], arguments: str, names: str
) -> None:
    try:
        status = main([*SMALL, *arguments.format(data=beton).split()])
    except SystemExit as stop:  # argparse's way
        status = int(stop.code or 0)
    assert status == 2
    assert names in capsys.readouterr().err.strip().splitlines()[-1]
