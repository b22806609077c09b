"""Labeled sets that belong together, and few labels: exactly the photos asked for."""

import shutil

import numpy as np
import pytest
from photo_folders import COLORS, write_photos

from ibeton.evaluation.finetune.sets import open_labeled
from ibeton.evaluation.finetune.subsets import few_labels
from ibeton.pipeline.convert.converter import main as convert
from ibeton.pipeline.loaders.kinds import turbojpeg_problem
from ibeton.pipeline.store.decode import UnreadablePhoto
from ibeton.pipeline.store.photos import TurboPhotos, open_photos


def test_classes_are_matched_by_name_between_a_folder_and_a_beton(folders, tmp_path):
    assert convert([str(folders[1]), str(tmp_path / "val.beton")]) == 0
    sets = open_labeled(str(folders[0]), str(tmp_path / "val.beton"))
    assert sets.classes == sorted(COLORS)
    for photos in (sets.train, sets.val):
        for index in range(len(photos)):
            color = photos.pixels(index).reshape(-1, 3).mean(0).argmax()  # red, green, blue
            assert sets.classes[photos.labels[index]] == ("red", "green", "blue")[color]


@pytest.mark.skipif(bool(turbojpeg_problem()), reason="libturbojpeg is not installed")
def test_a_beton_read_by_libjpeg_turbo_has_pillows_pixels(folders, tmp_path):
    beton = str(tmp_path / "train.beton")
    assert convert([str(folders[0]), beton]) == 0
    fast, plain = open_labeled(beton, beton).train, open_photos(beton)
    assert isinstance(fast, TurboPhotos)
    for index in range(len(plain)):
        assert np.array_equal(fast.pixels(index), plain.pixels(index))
    with open(beton, "r+b") as file:  # within the compressed data of the first photo
        file.seek(int(plain.pointers[0]) + int(plain.sizes[0]) // 2)
        file.write(b"\xff\xd9" * 20)
    said = []
    for photos in (open_labeled(beton, beton).train, open_photos(beton)):
        with pytest.raises(UnreadablePhoto) as refusal:
            photos.pixels(0)
        said.append(str(refusal.value))
    assert said[0] == said[1]


def test_a_set_with_other_classes_is_refused(folders, tmp_path):
    more = write_photos(tmp_path / "more", {**COLORS, "white": (200, 200, 200)}, 1)
    fewer = write_photos(tmp_path / "fewer", dict(list(COLORS.items())[:2]), 1)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(next(folders[0].rglob("*.jpg")), bare)
    for train, val, says in (
        (folders[0], more, "1 classes that the training set lacks .white."),
        (folders[0], fewer, "lacks classes of the training set: red .1 in all."),
        (folders[0], bare, "without a class"),
        (bare, folders[1], "without a class"),
        (folders[0], tmp_path / "none", "does not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            open_labeled(str(train), str(val))


def test_a_list_chooses_exactly_the_photos_that_it_names(folders, tmp_path):
    photos = open_labeled(*map(str, folders)).train
    (tmp_path / "list.txt").write_text("red/3.jpg\nblue/0.jpg\n\ngreen/7.jpg\n")
    few = few_labels(photos, str(tmp_path / "list.txt"), 0)
    assert [few.name(i) for i in range(3)] == ["blue/0.jpg", "green/7.jpg", "red/3.jpg"]
    assert few.labels.tolist() == [0, 1, 2]
    assert np.array_equal(few.pixels(2), photos.pixels(2 * 8 + 3))


def test_a_list_may_leave_out_the_class_folder_as_simclrs_does(folders, tmp_path):
    root = tmp_path / "imagenet"
    for name in ("n01", "n02"):
        (root / name).mkdir(parents=True)
        for j in range(3):
            shutil.copy(folders[0] / "red" / f"{j}.jpg", root / name / f"{name}_{j}.jpg")
    (tmp_path / "1percent.txt").write_text("n02_1.jpg\nn01_2.jpg\n")
    photos = open_labeled(str(root), str(root)).train
    few = few_labels(photos, str(tmp_path / "1percent.txt"), 0)
    assert [few.name(i) for i in range(2)] == ["n01/n01_2.jpg", "n02/n02_1.jpg"]


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_share_takes_equally_many_of_each_class_from_its_seed(folders, share):
    photos = open_labeled(*map(str, folders)).train

    def names(seed):
        few = few_labels(photos, str(share), seed)
        assert np.bincount(few.labels).tolist() == [8 * share] * 3
        return [few.name(i) for i in range(len(few))]

    assert names(0) == names(0)
    assert len({tuple(names(seed)) for seed in range(4)}) > 1
    assert len(set(names(0))) == 24 * share


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("red/3.jpg\nred/99.jpg\n", "1 photos that the training set lacks .red/99.jpg"),
        ("red/3.jpg\nred/3.jpg\n", "1 photos twice"),
        ("", "names no photos"),
        ("red/3.jpg\n1.jpg\n", "1.jpg is the name of several photos"),
        ("red/3.jpg\nblue/1.jpg\n", "1 classes without a photo .green."),
    ],
)
def test_a_bad_list_is_refused(folders, tmp_path, text, says):
    photos = open_labeled(*map(str, folders)).train
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=says):
        few_labels(photos, str(tmp_path / "list.txt"), 0)


def test_neither_a_file_nor_a_share_is_refused(folders):
    photos = open_labeled(*map(str, folders)).train
    with pytest.raises(FileNotFoundError, match="no such file"):
        few_labels(photos, "nowhere.txt", 0)
    with pytest.raises(ValueError, match="above 0, at most 1"):
        few_labels(photos, "1.5", 0)
