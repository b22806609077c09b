"""Classes, corruptions and backgrounds: oracles score 100, and figures are those worked by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ibeton.evaluation.frozen.features import STD, Extraction
from ibeton.evaluation.photos import PhotoSet, center_view, planes
from ibeton.evaluation.robustness.accuracy import (
    ALEXNET,
    background_scores,
    choose,
    corruption_scores,
    read_backgrounds,
    read_corruptions,
    read_in9_map,
    read_variant,
    top1,
)
from ibeton.evaluation.robustness.classifier import (
    class_names,
    imagenet_variant,
    imagenet_wnids,
)

SIDE = 8


class Oracle(nn.Module):
    """Reads a class number out of an image's color, and another, liked better, that is `wrong`."""

    def __init__(self, wrong: int | None = None) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scale = torch.tensor(STD).view(3, 1, 1)
        mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
        pixels = ((images * scale + mean) * 255).round()[:, :, 0, 0].long()  # [B, 3]
        logits = nn.functional.one_hot(pixels[:, 0] * 100 + pixels[:, 1], 1000).float()
        if self.wrong is not None:
            logits[:, self.wrong] = 2
        return logits


def write(folder: Path, number: int) -> None:
    """A photo whose color says which of a thousand classes it is of."""
    folder.mkdir(parents=True, exist_ok=True)
    color = (number // 100, number % 100, 0)
    Image.new("RGB", (SIDE, SIDE), color).save(folder / "photo.png")


@pytest.mark.parametrize("name", ["a", "r"])
def test_an_oracle_scores_100_by_the_class_maps(name, tmp_path):
    """The 200 classes of ImageNet-A and -R, by the folders' names, among a thousand."""
    wnids = imagenet_wnids()
    for wnid in imagenet_variant(name):
        write(tmp_path / wnid, wnids.index(wnid))
    photos, candidates = read_variant(name, tmp_path, SIDE, wnids)
    assert len(photos) == len(set(candidates)) == 200
    assert top1(Oracle(), photos, Extraction(), "oracle", candidates) == 100
    other = next(number for number in range(1000) if number not in candidates)
    misled = Oracle(wrong=other)  # a class outside of the 200 is no answer
    assert top1(misled, photos, Extraction(), "oracle", candidates) == 100
    assert top1(misled, photos, Extraction(), "oracle") == 0
    assert top1(Oracle(wrong=candidates[7]), photos, Extraction(), "oracle", candidates) == 0.5
    write(tmp_path / wnids[other], other)
    with pytest.raises(ValueError, match=f"has {wnids[other]}, which ImageNet-{name.upper()}"):
        read_variant(name, tmp_path, SIDE, wnids)
    (tmp_path / wnids[other]).rename(tmp_path / ".hidden")
    (tmp_path / wnids[candidates[3]] / "photo.png").unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of ImageNet-{name.upper()}'s 200 classes"):
        read_variant(name, tmp_path, SIDE, wnids)


def test_imagenets_lists():
    wnids = imagenet_wnids()
    assert (len(wnids), wnids[0], wnids[-1]) == (1000, "n01440764", "n15075141")
    assert wnids == sorted(wnids)
    assert imagenet_variant("a")[0] == "n01498041"  # stingray, class 6
    assert imagenet_variant("r")[0] == "n01443537"  # goldfish, class 1
    assert class_names([], 1000) == wnids
    assert class_names([str(i) for i in range(1000)], 1000) == wnids  # of a .beton without names
    assert class_names(["0", "1"], 2) == []
    assert class_names(["b", "a"], 2) == ["b", "a"]


def test_other_classifiers_choose_among_the_sets_classes(tmp_path):
    for name in ("cat", "dog"):
        write(tmp_path / name, 0)
    photos, candidates = read_variant("a", tmp_path, SIDE, ["bird", "cat", "cow", "dog"])
    assert candidates == [1, 3]
    assert photos.labels.tolist() == [1, 3]
    logits = torch.tensor([[9.0, 1, 8, 2], [9, 2, 8, 1]])
    assert choose(logits, torch.tensor(candidates)).tolist() == [3, 1]
    with pytest.raises(ValueError, match="classes that the training set lacks"):
        read_variant("a", tmp_path, SIDE, ["bird", "cat"])


def test_alexnets_own_errors_have_an_mce_of_100():
    errors = {name: [100 * error] * 5 for name, error in ALEXNET.items()}
    scores = corruption_scores(errors)
    assert scores["mce"] == pytest.approx(100)
    assert scores["mean_error"] == pytest.approx(100 * np.mean(list(ALEXNET.values())))
    halved = {name: [value / 2 for value in values] for name, values in errors.items()}
    assert corruption_scores(halved)["mce"] == pytest.approx(50)


def test_mce_is_of_the_15_and_the_mean_error_of_all():
    errors = {name: [100 * error] * 5 for name, error in ALEXNET.items()}
    errors["spatter"] = [0.0, 10, 20, 30, 40]
    scores = corruption_scores(errors)
    assert scores["spatter_error"] == 20
    assert scores["mce"] == pytest.approx(100)
    expected = (100 * sum(ALEXNET.values()) + 20) / 16
    assert scores["mean_error"] == pytest.approx(expected)
    del errors["fog"]
    assert "mce" not in corruption_scores(errors)


def test_photos_of_224_pixels_are_seen_whole_by_a_classifier_of_any_size():
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    stored = Image.fromarray(noise)
    assert torch.equal(center_view(stored, 224), planes(stored))
    for size in (96, 384):
        whole = stored.resize((size, size), Image.Resampling.BILINEAR)
        assert torch.equal(center_view(stored, size), planes(whole))
    framed = Image.new("RGB", (230, 228))  # the center alone of a larger one
    framed.paste(stored, (3, 2))
    assert torch.equal(center_view(framed, 224), planes(stored))


def test_corruptions_are_read_by_severity(tmp_path):
    for severity in range(1, 6):
        write(tmp_path / "fog" / str(severity) / "cat", severity)
    sets = read_corruptions(tmp_path, 6, ["bird", "cat"])
    assert list(sets) == ["fog"]
    assert list(sets["fog"]) == ["1", "2", "3", "4", "5"]
    view, label, _ = sets["fog"]["3"][0]
    assert label == 1
    assert view.shape == (3, 6, 6)
    assert (view[1] == 3).all()
    (tmp_path / "snow" / "1" / "cat").mkdir(parents=True)
    write(tmp_path / "snow" / "1" / "cat", 0)
    with pytest.raises(FileNotFoundError, match="snow/2 is missing"):
        read_corruptions(tmp_path, 6, ["bird", "cat"])


IN9 = ["00_dog", "01_bird", "02_vehicle", "03_reptile", "04_carnivore", "05_insect"]
IN9 += ["06_instrument", "07_primate", "08_fish"]


def test_backgrounds_go_by_the_map(tmp_path):
    """Class 10 n is of IN-9's class n, and so is 10 n + 1; others are of none."""
    pairs = {str(i): (i // 10 if i % 10 < 2 and i < 90 else -1) for i in range(1000)}
    (tmp_path / "map.json").write_text(json.dumps(pairs))
    mapped = read_in9_map(tmp_path / "map.json", 1000)
    assert mapped[[0, 1, 2, 81, 90]].tolist() == [0, 0, -1, 8, -1]
    for number, name in enumerate(IN9):
        write(tmp_path / "in9" / "original" / "val" / name, 10 * number + number % 2)
        write(tmp_path / "in9" / "only_fg" / "val" / name, 10 * number + 2 * (number < 3))
    masks = tmp_path / "in9" / "fg_mask" / "val" / IN9[0]  # of the published folder
    masks.mkdir(parents=True)
    (masks / "mask.npy").touch()
    sets = read_backgrounds(tmp_path / "in9", SIDE)
    assert list(sets) == ["only_fg", "original"]
    how = Extraction()
    assert top1(Oracle(), sets["original"], how, "in9", mapped=mapped) == 100
    assert top1(Oracle(), sets["only_fg"], how, "in9", mapped=mapped) == pytest.approx(100 * 6 / 9)
    (tmp_path / "in9" / "original" / "val" / IN9[4]).rename(tmp_path / "in9/original/val/cats")
    with pytest.raises(ValueError, match="IN-9 has nine, 00_dog to 08_"):
        read_backgrounds(tmp_path / "in9", SIDE)


def test_the_gap_of_backgrounds():
    scores = background_scores({"original": 90.0, "mixed_same": 80.0, "mixed_rand": 70.0})
    assert scores["bg_gap"] == 10
    assert "bg_gap" not in background_scores({"original": 90.0})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1, 2]", "is no JSON object of numbers"),
        ("nothing", "is no JSON object of numbers"),
        ('{"1000": 0}', "maps 1000 to 0"),
        ('{"3": 9}', "maps 3 to 9"),
        ('{"3": 1}', "maps no class to some of the classes of IN-9"),
    ],
)
def test_a_bad_map_is_refused(content, says, tmp_path):
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(ValueError, match=says):
        read_in9_map(tmp_path / "map.json", 1000)


def test_unreadable_photos_are_left_out(tmp_path, caplog):
    write(tmp_path / "a", 0)
    (tmp_path / "a" / "broken.png").write_bytes(b"nothing")
    assert top1(Oracle(), PhotoSet(tmp_path, SIDE), Extraction(), "oracle") == 100
    assert "left out of the evaluation: a/broken.png" in caplog.text
    (tmp_path / "a" / "photo.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of the 2 photos"):
        top1(Oracle(), PhotoSet(tmp_path, SIDE), Extraction(), "oracle")
