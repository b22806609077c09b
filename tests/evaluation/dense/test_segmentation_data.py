import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ibeton.evaluation.dense.photos import fitted, palette
from ibeton.evaluation.dense.segmentation_data import (
    IGNORED,
    LabeledPhotos,
    class_names,
    training_view,
)
from ibeton.evaluation.frozen.features import MEAN, STD


@pytest.fixture
def broken(scenes, tmp_path):
    return shutil.copytree(scenes, tmp_path / "scenes")


def test_labels_count_from_zero_and_zero_is_unlabeled(scenes):
    photos = LabeledPhotos(scenes, "train")
    image, labels = photos.read(0)
    stored = np.array(Image.open(scenes / "annotations/train/0.png"))
    assert image.shape == (3, *stored.shape)
    assert np.array_equal(labels.numpy(), np.where(stored == 0, IGNORED, stored - 1))
    assert photos.classes == ["ground", "red", "green", "blue"]
    kept = LabeledPhotos(scenes, "train", zero_is_class=True).read(0)[1]
    assert np.array_equal(kept.numpy(), stored)


def test_ade20ks_own_layout_and_names_are_read(broken):
    (broken / "images/train").rename(broken / "images/training")
    (broken / "annotations/train").rename(broken / "annotations/training")
    (broken / "classes.json").unlink()
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    lines += [f"{i}\t0.1\t5\t2\t1\t{name}" for i, name in enumerate(("wall", "building", "sky"), 1)]
    (broken / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    assert len(LabeledPhotos(broken, "train")) == 12
    assert class_names(broken) == ["wall", "building", "sky"]


def replace(path, array):
    path.unlink()
    Image.fromarray(array).save(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: replace(p, np.full((48, 64), 9, np.uint8)), r"0\.png holds label 9.* 1 to 4"),
        (lambda p: replace(p, np.ones((48, 60), np.uint8)), r"0\.png has 60 x 48 .* 64 x 48"),
        (lambda p: replace(p, np.ones((48, 64, 3), np.uint8)), r"0\.png is of mode RGB"),
        (lambda p: p.write_bytes(b"no picture"), r"0\.png cannot be read"),
        (lambda p: p.unlink(), r"0\.jpg has no label map .*0\.png"),
    ],
)
def test_a_bad_label_map_is_named(broken, damage, message):
    damage(broken / "annotations/train/0.png")
    with pytest.raises(ValueError, match=message):
        LabeledPhotos(broken, "train").read(0)


def test_a_bad_photo_a_bad_list_of_names_and_a_missing_folder_are_named(broken):
    (broken / "images/train/0.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0\.jpg cannot be read: the file is empty"):
        LabeledPhotos(broken, "train").read(0)
    (broken / "classes.json").write_text("{")
    with pytest.raises(ValueError, match=r"classes\.json is not JSON"):
        LabeledPhotos(broken, "train")
    (broken / "classes.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"classes\.json must hold a list"):
        LabeledPhotos(broken, "train")
    (broken / "classes.json").write_text(json.dumps(["ground", "sky", "ground"]))
    with pytest.raises(ValueError, match=r"classes\.json holds ground twice"):
        LabeledPhotos(broken, "train")
    (broken / "classes.json").unlink()
    (broken / "objectInfo150.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"objectInfo150\.txt must hold a list"):
        LabeledPhotos(broken, "train")
    (broken / "objectInfo150.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither classes\.json"):
        LabeledPhotos(broken, "train")
    (broken / "classes.json").write_text("[1, 2, 3, 4]")
    shutil.rmtree(broken / "images/val")
    with pytest.raises(FileNotFoundError, match="images/validation"):
        LabeledPhotos(broken, "val")


def test_sizes_fit_both_limits():
    assert fitted(300, 400, 512, 2048) == [512, 683]
    assert fitted(100, 1000, 512, 2048) == [205, 2048]
    assert fitted(400, 300, 512, 2048) == [683, 512]


def test_labels_stay_on_their_pixels_through_resize_crop_and_flip():
    """A photo whose red channel is its own label map, so that any shift would show."""
    labels = (torch.arange(64)[None] // 8 % 2).repeat(48, 1).to(torch.uint8)
    image = (labels * 200)[None].repeat(3, 1, 1)
    for seed in range(5):
        torch.manual_seed(seed)
        view, classes = training_view(64, 48, image, labels)
        red = (view[0] * STD[0] + MEAN[0]) * 255
        inside = classes != IGNORED
        assert inside.any()
        # Colors are distorted and edges are soft: means of the two classes stay far apart.
        assert red[inside & (classes == 1)].mean() > red[inside & (classes == 0)].mean() + 50


def test_views_have_one_size_and_filling_is_unlabeled():
    torch.manual_seed(3)
    image = torch.full((3, 20, 30), 128, dtype=torch.uint8)
    view, labels = training_view(96, 24, image, torch.zeros(20, 30, dtype=torch.uint8))
    assert view.shape == (3, 96, 96)
    assert labels.shape == (96, 96)
    assert (view[:, labels == IGNORED] == 0).all()
    assert set(labels.unique().tolist()) == {0, IGNORED}


def test_crops_of_one_class_are_drawn_again():
    labels = torch.zeros(64, 512, dtype=torch.uint8)
    labels[:, 480:] = 1
    shares = []
    for seed in range(30):
        torch.manual_seed(seed)
        _, view = training_view(64, 128, torch.zeros(3, 64, 512, dtype=torch.uint8), labels)
        shares.append(bool((view == 1).any()))
    # One window in about eight touches the second class; with ten tries many more.
    assert sum(shares) > 9


def test_colors_of_a_palette_differ_and_unlabeled_is_black():
    colors = palette(150)
    assert len(np.unique(colors, axis=0)) == 151
    assert colors[150].tolist() == [0, 0, 0]
