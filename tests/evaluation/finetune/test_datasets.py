"""Data sets in their own layouts, small ones written here, and what is said of broken ones."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from ibeton.evaluation.finetune.datasets import open_dataset

RNG = np.random.default_rng(0)


def write_photo(path, color):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (color, 0, 0)).save(path, quality=95)


def red(photos, index):
    """The first pixel's red, by which a photo is told from another."""
    return int(photos.pixels(index)[0, 0, 0])


def write_pickle(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


def write_cifar10(root, labels=(0, 1, 2)):
    folder = root / "cifar-10-batches-py"
    rows = RNG.integers(0, 256, (18, 3072), dtype=np.uint8)
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        own = rows[3 * i : 3 * i + 3]
        write_pickle(folder / name, {"data": own, "labels": list(labels), "batch_label": name})
    write_pickle(folder / "batches.meta", {"label_names": ["air", "bird", "cat"]})
    return rows


def test_cifar_10_has_planes_for_pixels_and_six_batches(tmp_path):
    rows = write_cifar10(tmp_path)
    sets = open_dataset("cifar10", str(tmp_path))
    assert (len(sets.train), len(sets.val)) == (15, 3)
    assert sets.classes == ["air", "bird", "cat"]
    assert sets.train.labels.tolist() == [0, 1, 2] * 5
    assert np.array_equal(sets.train.pixels(4)[:, :, 1].ravel(), rows[4, 1024:2048])
    assert np.array_equal(sets.val.pixels(2)[:, :, 2].ravel(), rows[17, 2048:])


def test_cifar_100_takes_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    rows = RNG.integers(0, 256, (4, 3072), dtype=np.uint8)
    for name in ("train", "test"):
        labels = {"fine_labels": [3, 0, 1, 2], "coarse_labels": [0, 0, 0, 0]}
        write_pickle(folder / name, {"data": rows, **labels})
    write_pickle(folder / "meta", {"fine_label_names": list("abcd"), "coarse_label_names": ["x"]})
    sets = open_dataset("cifar100", str(tmp_path))
    assert sets.train.labels.tolist() == [3, 0, 1, 2]
    assert sets.classes == list("abcd")


def write_flowers(root, labels=None):
    for number in range(1, 8):
        write_photo(root / "jpg" / f"image_{number:05d}.jpg", 30 * number)
    labels = np.array([1, 2, 3, 4, 5, 6, 102]) if labels is None else labels
    savemat(root / "imagelabels.mat", {"labels": labels[None]})
    splits = {"trnid": [[5, 1]], "valid": [[2]], "tstid": [[3, 4, 6, 7]]}
    savemat(root / "setid.mat", splits)


def test_flowers_learn_from_train_and_val_and_labels_count_from_one(tmp_path):
    write_flowers(tmp_path)
    sets = open_dataset("flowers", str(tmp_path))
    assert sets.train.labels.tolist() == [0, 1, 4]
    assert [round(red(sets.train, i) / 30) for i in range(3)] == [1, 2, 5]
    assert sets.val.labels.tolist() == [2, 3, 5, 101]
    assert len(sets.classes) == 102


def write_cars(root, labels=(1, 196, 3)):
    kinds = [("relative_im_path", "O"), ("class", "O"), ("test", "O")]
    rows = np.zeros((1, 3), dtype=kinds)
    for i, (label, test) in enumerate(zip(labels, (0, 1, 0), strict=True)):
        rows[0, i] = (f"car_ims/{i}.jpg", label, test)
        write_photo(root / "car_ims" / f"{i}.jpg", 60 * i)
    names = np.array([f"car {i}" for i in range(196)], dtype=object)[None]
    savemat(root / "cars_annos.mat", {"annotations": rows, "class_names": names})


def test_cars_are_split_by_the_test_flag_and_labels_count_from_one(tmp_path):
    write_cars(tmp_path)
    sets = open_dataset("cars", str(tmp_path))
    assert sets.train.labels.tolist() == [0, 2]
    assert [round(red(sets.train, i) / 60) for i in range(2)] == [0, 2]
    assert sets.val.labels.tolist() == [195]
    assert sets.classes[195] == "car 195"


def write_inat(root, category=1, inner="Birds/"):
    for split in ("train", "val"):
        images, notes = [], []
        for i in range(3):
            label = category if i == 2 else i
            name = f"train_val2018/Birds/{label}/{split}{i}.jpg"
            write_photo(root / "train_val2018" / f"{inner}{label}/{split}{i}.jpg", 50 * i)
            images.append({"id": 70 + i, "file_name": name})
            notes.insert(0, {"image_id": 70 + i, "category_id": label})
        content = {"images": images, "annotations": notes}
        (root / f"{split}2018.json").write_text(json.dumps(content))
    names = [{"id": 0, "name": "wren"}, {"id": 1, "name": "owl"}]
    (root / "categories.json").write_text(json.dumps(names))


@pytest.mark.parametrize("inner", ["Birds/", ""])
def test_inaturalist_follows_annotations_with_or_without_the_super_category(tmp_path, inner):
    write_inat(tmp_path, inner=inner)
    sets = open_dataset("inat18", str(tmp_path))
    assert sets.classes == ["wren", "owl"]
    assert sets.train.labels.tolist() == [1, 1, 0]
    assert [round(red(sets.train, i) / 50) for i in range(3)] == [2, 1, 0]
    assert sets.val.name(0).endswith("1/val2.jpg")


class Evil:
    def __reduce__(self):
        return (print, ("owned",))


def broken_pickle(root):
    write_cifar10(root)
    write_pickle(root / "cifar-10-batches-py" / "data_batch_3", {"data": Evil(), "labels": [0]})


def short_rows(root):
    write_cifar10(root)
    rows = np.zeros((3, 100), np.uint8)
    content = {"data": rows, "labels": [0, 1, 2]}
    write_pickle(root / "cifar-10-batches-py" / "data_batch_3", content)


def no_photos_of_flowers(root):
    write_flowers(root)
    (root / "jpg" / "image_00001.jpg").unlink()


def ids_beyond(root):
    write_flowers(root, np.array([1, 2, 3]))


@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("cifar10", lambda root: None, "batches.meta does not exist"),
        ("cifar10", lambda root: write_cifar10(root, (0, 1, 3)), "label 3"),
        ("cifar10", lambda root: write_cifar10(root, (0, -1, 2)), "label -1"),
        ("cifar10", broken_pickle, "print"),
        ("cifar10", short_rows, "3072 for each label"),
        ("flowers", lambda root: None, "imagelabels.mat does not exist"),
        ("flowers", lambda root: write_flowers(root, np.array([1] * 6 + [103])), "label 102"),
        ("flowers", no_photos_of_flowers, "image_00001.jpg does not exist"),
        ("flowers", ids_beyond, "beyond the 3 labels"),
        ("cars", lambda root: write_cars(root, (1, 196, 0)), "label -1"),
        ("cars", lambda root: write_cars(root, (1, 197, 3)), "label 196"),
        ("cars", lambda root: (root / "cars_annos.mat").write_text("x"), "not a valid MATLAB file"),
        ("inat18", lambda root: write_inat(root, category=2), "label 2"),
        (
            "inat18",
            lambda root: (root / "categories.json").write_text("{"),
            "not a valid JSON file",
        ),
        ("inat19", write_inat, "train2019.json does not exist"),
    ],
)
def test_a_bad_layout_is_named_in_one_sentence(name, write, says, tmp_path, capsys):
    write(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=says) as refused:
        open_dataset(name, str(tmp_path))
    assert str(tmp_path) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert capsys.readouterr().out == "", "something in a pickle was run"


def test_pickles_of_other_programs_load_with_old_names_of_numpy(tmp_path):
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    text = io.BytesIO(path.read_bytes()).read().replace(b"numpy._core", b"numpy.core")
    path.write_bytes(text)
    assert len(open_dataset("cifar10", str(tmp_path)).train) == 15
