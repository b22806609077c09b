"""Data sets in their own layouts, read from disk; nothing is ever downloaded.

cifar10    cifar-10-batches-py/{data_batch_1 .. 5,test_batch,batches.meta}
cifar100   cifar-100-python/{train,test,meta}
flowers    jpg/image_00001.jpg ..., imagelabels.mat, setid.mat    learns from train + val
cars       cars_annos.mat, and the photos at the paths in it      labels 1 .. 196
inat18/19  {train,val}{2018,2019}.json, categories.json, and the photos at the names in them
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ibeton.evaluation.finetune.sets import ArrayPhotos, LabeledSets, listed_photos
from ibeton.evaluation.plain_pickle import read_pickle
from ibeton.pipeline.store.photos import Photos


def open_dataset(name: str, root: str) -> LabeledSets:
    """The published split of data set `name` below `root`. Raises ValueError or FileNotFoundError,
    naming the file, for another layout."""
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--root {root} is not a folder; give the folder that contains {name}"
        )
    train, val, classes = _READERS[name](folder)
    return LabeledSets(train, val, classes)


def _need(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: see docs/evaluation.md for the layout")
    return path


Split = tuple[Any, Any, list[str]]  # photos to train on, to evaluate on, names of classes


def _cifar(
    folder: Path, parts: tuple[list[str], list[str]], labels: str, meta: tuple[str, str]
) -> Split:
    classes = [str(name) for name in _entry(folder / meta[0], meta[1])]

    def read(names: list[str]) -> ArrayPhotos:
        images, numbers = [], []
        for name in names:
            rows = np.asarray(_entry(folder / name, "data"))
            own = np.asarray(_entry(folder / name, labels))
            if rows.dtype != np.uint8 or rows.shape != (len(own), 3072):
                raise ValueError(
                    f"{folder / name} holds data {rows.dtype} {list(rows.shape)} and {len(own)}"
                    " labels: expected bytes, 3072 for each label"
                )
            images.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            numbers.append(own)
        whole = np.ascontiguousarray(np.concatenate(images))
        return ArrayPhotos(folder, whole, np.concatenate(numbers), classes)

    return read(parts[0]), read(parts[1]), classes


def _entry(path: Path, name: str) -> Any:
    content = read_pickle(_need(path), "batch of CIFAR")
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no batch of CIFAR: it holds a {type(content).__name__}")
    if name not in content:
        raise ValueError(f"{path} has no {name}: it holds {', '.join(map(str, content))}")
    return content[name]


def _mat(path: Path, name: str) -> np.ndarray:
    from scipy.io import loadmat  # only here: takes a second

    try:
        content = loadmat(_need(path), squeeze_me=True)
    except Exception as error:
        raise ValueError(f"{path} is not a valid MATLAB file ({error})") from error
    if name not in content:
        raise ValueError(f"{path} has no variable {name}")
    return np.atleast_1d(content[name])


def _flowers(root: Path) -> Split:
    labels = _mat(root / "imagelabels.mat", "labels").astype(np.int64) - 1
    classes = [str(i + 1) for i in range(102)]

    def photos(*splits: str) -> Photos:
        numbers = np.sort(np.concatenate([_mat(root / "setid.mat", name) for name in splits]))
        if len(numbers) and not 1 <= numbers.min() <= numbers.max() <= len(labels):
            raise ValueError(f"{root / 'setid.mat'} names photos beyond the {len(labels)} labels")
        names = [f"jpg/image_{number:05d}.jpg" for number in numbers]
        return listed_photos(root, names, labels[numbers.astype(int) - 1], classes)

    return photos("trnid", "valid"), photos("tstid"), classes


def _cars(root: Path) -> Split:
    path = root / "cars_annos.mat"
    rows = _mat(path, "annotations")
    classes = [str(name) for name in _mat(path, "class_names")]
    fields = {"relative_im_path", "class", "test"}
    if not fields <= set(rows.dtype.names or ()):
        raise ValueError(f"{path}: annotations lack {', '.join(sorted(fields))}")
    labels = rows["class"].astype(np.int64) - 1  # 1 .. 196 in the file
    held_out = rows["test"].astype(bool)

    def photos(chosen: np.ndarray) -> Photos:
        names = [str(name) for name in rows["relative_im_path"][chosen]]
        if not names:
            raise ValueError(f"{path} names no photos for one of its two splits")
        return listed_photos(root, names, labels[chosen], classes)

    return photos(~held_out), photos(held_out), classes


def _inat(root: Path, year: int) -> Split:
    listed = _json(root / "categories.json")
    try:
        names = {int(one["id"]): str(one["name"]) for one in listed}
        classes = [names.get(i, str(i)) for i in range(max(names) + 1)]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{root / 'categories.json'}: expected a list of id and name") from error

    def photos(split: str) -> Photos:
        path = root / f"{split}{year}.json"
        content = _json(path)
        try:
            files = {one["id"]: str(one["file_name"]) for one in content["images"]}
            pairs = [(files[a["image_id"]], int(a["category_id"])) for a in content["annotations"]]
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path}: expected images with id and file_name, annotations with image_id and"
                f" category_id ({error!r})"
            ) from error
        if not pairs:
            raise ValueError(f"{path} holds no photos")
        found = [_inat_file(root, name) for name, _ in pairs]
        return listed_photos(root, found, np.array([label for _, label in pairs]), classes)

    return photos("train"), photos("val"), classes


def _inat_file(root: Path, name: str) -> str:
    """a/b/<category>/file, or a/<category>/file where a copy leaves out the super-category b."""
    parts = name.split("/")
    if len(parts) == 4 and not (root / parts[0] / parts[1]).is_dir():
        return "/".join((parts[0], *parts[2:]))
    return name


def _json(path: Path) -> Any:
    try:
        return json.loads(_need(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a valid JSON file ({error})") from error


_CIFAR10 = ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"])
_CIFAR100 = (["train"], ["test"])
_READERS: dict[str, Callable[[Path], Split]] = {
    "cifar10": lambda root: _cifar(
        root / "cifar-10-batches-py", _CIFAR10, "labels", ("batches.meta", "label_names")
    ),
    "cifar100": lambda root: _cifar(
        root / "cifar-100-python", _CIFAR100, "fine_labels", ("meta", "fine_label_names")
    ),
    "flowers": _flowers,
    "cars": _cars,
    "inat18": lambda root: _inat(root, 2018),
    "inat19": lambda root: _inat(root, 2019),
}
