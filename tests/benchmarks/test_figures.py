"""How benchmarks choose their photos and write their figures."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from ibeton.benchmarks import loader
from ibeton.benchmarks.evaluation import dense, finetune
from ibeton.benchmarks.harness.measure import number
from ibeton.benchmarks.throughput import loader_ms
from ibeton.stages import StageWork
from ibeton.training.timing.speed import Window


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0000123456, "0.0000123"),
        (0.0123, "0.0123"),
        (0.0, "0"),
        (1.5, "1.5"),
        (99.94, "99.9"),
        (99.96, "100"),
        (1234567.8, "1,234,568"),
    ],
)
def test_numbers_are_written_without_an_exponent(value: float, text: str) -> None:
    assert number(value) == text


def test_a_stage_may_have_no_work_in_some_rounds() -> None:
    windows = [Window(), Window()]
    windows[0].add(8, {}, {"read": StageWork(1.0, 8, 2)})
    windows[1].add(8, {}, {"read": StageWork(1.0, 8, 2), "decode": StageWork(3.0, 8, 2)})
    found = loader_ms(windows, 8)
    assert found == {
        "read": {"ms": [500.0, 500.0], "workers": 2},
        "decode": {"ms": [0.0, 1500.0], "workers": 2},
    }


def test_no_photo_by_nvjpeg_is_no_distance() -> None:
    assert loader.in_words([]) == ""
    assert "by 0.200 of 255 in the mean, 40 at most" in loader.in_words([(0.1, 40), (0.3, 9)])


def test_paths_with_spaces_reach_the_segmenter(monkeypatch: pytest.MonkeyPatch) -> None:
    def segment(words: list[str]) -> int:
        given = dict(zip(words[:6:2], words[1:6:2], strict=True))
        assert (given["--checkpoint"], given["--data"]) == ("my run/a b.pt", "my photos")
        scores = {"scores": {"miou": 0.5}}
        (Path(given["--output-dir"]) / "scores.json").write_text(json.dumps(scores))
        return 0

    monkeypatch.setattr(dense, "segment", segment)
    assert dense.learned("my run/a b.pt", "my photos", 10)["pre-trained"] == 0.5


def test_the_title_says_what_repeats_save() -> None:
    args = Namespace(image_size=224, workers=1, repeats=1)
    assert finetune.title(args) == "training views of 224 pixels, 1 worker"
    args.repeats = 3
    assert finetune.title(args).endswith("; ibeton decodes 1/3 of the photos")


def test_links_are_spread_over_the_whole_set(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / "data" / f"class{i}").mkdir(parents=True)
        (tmp_path / "data" / f"class{i}" / "a.jpg").touch()
    args = Namespace(batches=3, batch_size=2)
    links = finetune._links(tmp_path / "data", tmp_path, args)
    chosen = sorted(path.parent.name for path in links.glob("*/*"))
    assert (len(chosen), chosen[0], chosen[-1]) == (6, "class0", "class9")
