"""Labeled photos as fine-tuning takes them, whatever holds them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ibeton.evaluation.photos import labels_by_name, open_checked, some
from ibeton.pipeline.store.photos import FolderPhotos, Photos
from ibeton.pipeline.store.sources import Photo, Source


def listed_photos(
    root: Path, names: list[str], labels: np.ndarray, classes: list[str]
) -> FolderPhotos:
    """Photo files `names` [n] below a folder with `labels` int64 [n] into `classes`. Raises
    ValueError for labels out of range, and for a first file that is missing."""
    check_labels(root, labels, len(classes))
    if not (root / names[0]).is_file():
        raise ValueError(f"{root / names[0]} does not exist, which the lists in {root} name")
    pairs = zip(names, labels.tolist(), strict=True)
    photos = [Photo(name, label, str(root)) for name, label in pairs]
    return FolderPhotos(Source(str(root), photos, classes))


class ArrayPhotos:
    """Photos that are pixels already: `images` uint8 [n, H, W, 3]. Raises as `check_labels`."""

    def __init__(
        self, path: Path, images: np.ndarray, labels: np.ndarray, classes: list[str]
    ) -> None:
        check_labels(path, labels, len(classes))
        self._path, self._images = path, images
        self.labels, self.classes = labels.astype(np.int64), classes
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self._images)

    def photo_bytes(self, index: int) -> bytes:
        return self._images[index].tobytes()

    def pixels(self, index: int) -> np.ndarray:
        return self._images[index]

    def name(self, index: int) -> str:
        return f"photo {index} of {self._path}"


class SomePhotos:
    """Photos `rows` int64 [m] of others, with their labels replaced by `labels` int64 [m]."""

    def __init__(
        self, photos: Photos, rows: np.ndarray, labels: np.ndarray, classes: list[str]
    ) -> None:
        self._photos, self._rows = photos, rows
        self.labels, self.classes, self.notes = labels, classes, photos.notes

    def __len__(self) -> int:
        return len(self._rows)

    def photo_bytes(self, index: int) -> bytes | memoryview:
        return self._photos.photo_bytes(int(self._rows[index]))

    def pixels(self, index: int) -> np.ndarray:
        return self._photos.pixels(int(self._rows[index]))

    def name(self, index: int) -> str:
        return self._photos.name(int(self._rows[index]))


@dataclass(frozen=True)
class LabeledSets:
    """What to train on and what to evaluate on; labels of both index `classes`."""

    train: Photos
    val: Photos
    classes: list[str]


def check_labels(path: Path | str, labels: np.ndarray, classes: int) -> None:
    """Raise ValueError where there are no photos or a label is not in 0 .. classes - 1."""
    if not len(labels):
        raise ValueError(f"{path} holds no photos")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = int(labels.min() if labels.min() < 0 else labels.max())
        raise ValueError(f"{path} holds label {wrong}, but has classes 0 .. {classes - 1} alone")


def open_labeled(train: str, val: str) -> LabeledSets:
    """The labeled sets of two folders, tars or .beton files, whose classes are matched by name.

    Raises FileNotFoundError or ValueError, naming the path: without photos, with unlabeled photos,
    labels beyond the named classes, or classes that only one of the sets has.
    """
    learned, judged = (open_checked(path) for path in (train, val))
    classes = learned.classes or [str(i) for i in range(int(learned.labels.max()) + 1)]
    for path, photos in ((train, learned), (val, judged)):
        check_labels(path, photos.labels, len(photos.classes or classes))
    empty = [classes[i] for i in np.setdiff1d(np.arange(len(classes)), learned.labels)]
    if empty:
        raise ValueError(
            f"{train} has no photo of {len(empty)} of its {len(classes)} classes"
            f" ({some(empty)}): nothing could be learned about them"
        )
    if learned.classes and judged.classes:
        labels = labels_by_name(val, judged, classes)
        if absent := [name for name in classes if name not in set(judged.classes)]:
            raise ValueError(
                f"{val} lacks classes of the training set: {some(absent)} ({len(absent)} in all);"
                " give two sets of the same classes"
            )
        judged = SomePhotos(judged, np.arange(len(judged)), labels, classes)
    return LabeledSets(learned, judged, classes)
