"""Few labels: the photos that a list names, or a stratified share."""

from pathlib import Path

import numpy as np
from torch import from_numpy

from ibeton.evaluation.finetune.sets import SomePhotos
from ibeton.evaluation.frozen.semi import balanced_subset
from ibeton.evaluation.photos import text_of
from ibeton.pipeline.store.photos import Photos


def few_labels(photos: Photos, wanted: str, seed: int) -> SomePhotos:
    """The part of `photos` that `wanted` says: a file of photo names, one per line, as SimCLR's
    1percent.txt, or a share such as 0.1, of which each class gives equally many, from `seed`.

    A name may carry its class folder or not. Raises ValueError or FileNotFoundError for names that
    are not there, come twice, or leave a class without a photo, and for a share outside 0 .. 1.
    """
    try:
        share = float(wanted)
    except ValueError:
        rows = listed_rows(photos, Path(wanted))
    else:
        rows = balanced_subset(from_numpy(photos.labels), share, seed).numpy()
    labels = photos.labels[rows]
    absent = np.setdiff1d(photos.labels, labels)
    if len(absent):
        first = photos.classes[absent[0]] if photos.classes else absent[0]
        raise ValueError(
            f"--labels {wanted} leaves {len(absent)} classes without a photo ({first})"
        )
    return SomePhotos(photos, rows, labels, photos.classes)


def listed_rows(photos: Photos, path: Path) -> np.ndarray:
    """Rows int64, rising, of the photos that the file at `path` names."""
    if not path.is_file():
        raise FileNotFoundError(f"--labels {path}: no such file, and no share such as 0.1")
    names = [line.strip() for line in text_of(path).splitlines() if line.strip()]
    if not names:
        raise ValueError(f"--labels {path} names no photos")
    if len(set(names)) < len(names):
        raise ValueError(f"--labels {path} names {len(names) - len(set(names))} photos twice")
    full = {photos.name(row): row for row in range(len(photos))}
    by_name, unsure = dict(full), set()
    for name, row in full.items():
        bare = name.rsplit("/", 1)[-1]
        if by_name.setdefault(bare, row) != row and bare not in full:
            unsure.add(bare)
    if doubtful := [name for name in names if name in unsure]:
        raise ValueError(
            f"--labels {path}: {doubtful[0]} is the name of several photos; write it with its"
            " class folder"
        )
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ValueError(
            f"--labels {path} names {len(missing)} photos that the training set lacks"
            f" ({missing[0]}, ...); its first photo is called {photos.name(0)}"
            + ("" if "/" in photos.name(0) else "; a .beton keeps no names: give the folder or tar")
        )
    return np.unique([by_name[name] for name in names])
