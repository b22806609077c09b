"""`ibeton copies` on a small set in the layout of Copydays."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibeton.__main__ import main as ibeton
from ibeton.evaluation.frozen.features import Extraction, extract
from ibeton.evaluation.matching.copies import copy_scores, whitening
from ibeton.evaluation.photos import PhotoSet, square_view
from ibeton.model.checkpoint import load_backbone

ORIGINALS = 12


def picture(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((120, 100), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def copydays(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("copydays")
    for folder in ("original", "strong", "jpegqual/3", "jpegqual/20", "crops/10"):
        (root / folder).mkdir(parents=True)
    for i in range(ORIGINALS):
        image, name = picture(i), f"2{i:03d}"
        image.save(root / "original" / f"{name}00.jpg")
        for quality in (3, 20):
            image.save(root / "jpegqual" / str(quality) / f"{name}00.jpg", quality=quality)
        image.crop((6, 5, 114, 95)).save(root / "crops" / "10" / f"{name}00.jpg")
        for number, copy in enumerate((image.crop((30, 0, 120, 80)), image.rotate(4)), start=1):
            copy.save(root / "strong" / f"{name}0{number}.jpg", quality=30)
    for folder in ("distractors", "whitening"):
        (root.parent / folder).mkdir(exist_ok=True)
        for i in range(20):
            picture(100 + i).save(root.parent / folder / f"photo_{i}.jpg")
    return root


def call(checkpoint: Path, root: Path, *also: object) -> list[str]:
    given = ("copies", "--checkpoint", checkpoint, "--data", root, "--device", "cpu", *also)
    return [str(part) for part in given]


def test_copies_find_their_originals(checkpoint, copydays, tmp_path):
    path = tmp_path / "scores.json"
    assert ibeton(call(checkpoint, copydays, "--json", path)) == 0
    report = json.loads(path.read_text())
    scores = report["scores"]["teacher"]["copies"]
    names = ["strong", "jpegqual/3", "jpegqual/20", "crops/10", "jpegqual_mean", "crops_mean"]
    assert list(scores) == names
    assert report["image_size"] == 32
    assert scores["jpegqual_mean"] == (scores["jpegqual/3"] + scores["jpegqual/20"]) / 2
    chance = 100 * np.mean(1 / np.arange(1, ORIGINALS + 1))  # at most: precision at a random place
    assert scores["jpegqual/20"] > 90
    assert min(scores.values()) > chance + 10
    beside = ("--distractors", copydays.parent / "distractors", "--json", path)
    assert ibeton(call(checkpoint, copydays, *beside)) == 0
    harder = json.loads(path.read_text())["scores"]["teacher"]["copies"]
    assert all(harder[name] <= scores[name] for name in scores)
    white = ("--whitening", copydays.parent / "whitening", "--json", path)
    assert ibeton(call(checkpoint, copydays, *white)) == 0
    assert json.loads(path.read_text())["scores"]["teacher"]["copies"] != scores


def test_map_of_copies_by_hand():
    originals = torch.eye(4)  # the last one is a distractor
    queries = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 2.0, 1.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    # a at place 0; b at place 1: (0 + 1/2) / 2; c at place 1
    found = copy_scores(queries, originals, ["a", "b", "c"], ["a", "b", "c"])
    assert found == pytest.approx(100 * (1 + 1 / 4 + 1 / 4) / 3)
    assert copy_scores(originals[:3], originals, list("abc"), list("abc")) == 100


def test_only_the_first_twenty_count():
    originals = torch.eye(30)
    query = torch.arange(30.0, 0, -1).unsqueeze(0)
    names = [str(i) for i in range(30)]
    assert copy_scores(query, originals, ["19"], names) > 0
    assert copy_scores(query, originals, ["20"], names) == 0


def test_the_feature_is_the_class_token_and_the_generalized_mean(checkpoint, copydays):
    backbone, _ = load_backbone(checkpoint)
    photos = PhotoSet(copydays / "original", 32, view=square_view, labeled=False)
    found = extract(backbone, photos, ("gem", "patches"), Extraction())
    patches = found["patches"].double().clamp(min=1e-6)
    assert torch.allclose(found["gem"].double(), (patches**4).mean(dim=1) ** 0.25, rtol=1e-4)
    assert np.array_equal(photos[0][0], np.array(picture_of(copydays)).transpose(2, 0, 1))


def picture_of(root: Path) -> Image.Image:
    first = Image.open(root / "original" / "200000.jpg")
    return first.resize((32, 32), Image.Resampling.BICUBIC)


def test_whitened_features_have_unit_covariance():
    torch.manual_seed(0)
    features = torch.randn(500, 6) @ torch.randn(6, 6) + 3
    mean, matrix = whitening(features)
    white = (features - mean) @ matrix
    assert torch.allclose(white.mean(dim=0), torch.zeros(6), atol=1e-4)
    assert torch.allclose(torch.cov(white.T, correction=0), torch.eye(6), atol=1e-3)


def test_another_layout_is_one_sentence_and_status_2(checkpoint, copydays, tmp_path, capsys):
    def refused(says: str, root: Path, *also: object) -> None:
        with pytest.raises(SystemExit) as stopped:
            ibeton(call(checkpoint, root, "--json", tmp_path / "scores.json", *also))
        assert stopped.value.code == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        assert says in said[0]
        assert not (tmp_path / "scores.json").exists()

    refused("original is missing; give Copydays", tmp_path)
    picture(0).save((tmp_path / "original").mkdir() or tmp_path / "original" / "200000.jpg")
    refused("has none of strong, jpegqual/N and crops/N", tmp_path)
    (tmp_path / "strong").mkdir()
    refused("strong holds no photos", tmp_path)
    picture(0).save(tmp_path / "strong" / "300001.jpg")
    refused("strong/300001.jpg has no original 3000", tmp_path)
    refused("nowhere", copydays, "--distractors", tmp_path / "nowhere")
    refused("33", copydays, "--image-size", 33)
