"""Photos with a label per pixel, in ADE20K's layout or a plain one, the published views of them,
and scores from one confusion matrix over the whole set.

    DIR/images/{training,validation}/*.jpg     DIR/annotations/{training,validation}/*.png
    DIR/images/{train,val}/...                 DIR/annotations/{train,val}/...

Labels are gray or palette PNGs. 0 is unlabeled and 1 is the first class (ADE20K), unless
`zero_is_class`: then 255 is unlabeled. Names come from DIR/classes.json, a list, or ADE20K's
objectInfo150.txt. Inside, classes count from 0 and IGNORED marks pixels without one.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ibeton.evaluation.dense.photos import fitted, read_photo
from ibeton.evaluation.frozen.features import normalized
from ibeton.evaluation.photos import opened

IGNORED = 255
MOST_OF_ONE = 0.75  # a crop with a larger share of one class is drawn again, at most ten times
_FOLDERS = {"train": ("training", "train"), "val": ("validation", "val")}


class LabeledPhotos:
    """The photos of a part ("train" or "val") and their label maps; `names` are the files'.

    Raises FileNotFoundError or ValueError, naming it, for a folder or a label map that is missing.
    """

    def __init__(self, root: str | Path, part: str, zero_is_class: bool = False) -> None:
        self.root, self.classes, self.zero_is_class = Path(root), class_names(root), zero_is_class
        found = [self.root / "images" / name for name in _FOLDERS[part]]
        images = next((folder for folder in found if folder.is_dir()), None)
        if images is None:
            raise FileNotFoundError(f"--data {root}: there is neither {found[0]} nor {found[1]}")
        self.images, self.labels = images, self.root / "annotations" / images.name
        self.names = sorted(p.name for p in images.iterdir() if not p.name.startswith("."))
        if not self.names:
            raise ValueError(f"{images} holds no photos")
        if not self.labels.is_dir():
            raise FileNotFoundError(f"{self.labels}, the folder of label maps, is missing")
        there = {path.name for path in self.labels.iterdir()}
        for name in self.names:
            if self._map(name).name not in there:
                raise ValueError(f"{images / name} has no label map {self._map(name)}")

    def _map(self, name: str) -> Path:
        return (self.labels / name).with_suffix(".png")

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """uint8 [3, H, W] and classes uint8 [H, W]. Raises ValueError that names the file."""
        image, where = read_photo(self.images / self.names[index]), self._map(self.names[index])
        stored, (height, width) = opened(where), image.shape[1:]
        if stored.mode not in ("L", "P", "1"):
            raise ValueError(
                f"{where} is of mode {stored.mode}: a label map is gray or has a palette"
            )
        if stored.size != (width, height):
            raise ValueError(
                f"{where} has {stored.width} x {stored.height} pixels and its photo {width} x"
                f" {height}"
            )
        labels = np.array(stored, dtype=np.uint8)
        if not self.zero_is_class:
            labels = labels - np.uint8(1)  # 0 becomes 255
        named = labels[labels != IGNORED]
        if named.size and named.max() >= len(self.classes):
            first = 0 if self.zero_is_class else 1
            raise ValueError(
                f"{where} holds label {named.max() + first}, and the {len(self.classes)} classes of"
                f" {self.root} are {first} to {len(self.classes) - 1 + first}"
            )
        return image, torch.from_numpy(labels)


def class_names(root: str | Path) -> list[str]:
    """The classes of a data set. Raises ValueError or FileNotFoundError, naming the file."""
    listed, info = Path(root) / "classes.json", Path(root) / "objectInfo150.txt"
    if listed.is_file():
        try:
            names = json.loads(listed.read_text())
        except ValueError as error:
            raise ValueError(f"{listed} is not JSON ({error})") from error
    elif info.is_file():
        lines = info.read_text(errors="replace").splitlines()[1:]
        names = [line.split("\t")[-1].strip() for line in lines if line]
    else:
        raise FileNotFoundError(
            f"--data {root}: neither {listed.name}, a list of class names, nor ADE20K's {info.name}"
        )
    file = listed if listed.is_file() else info
    if not isinstance(names, list) or not 1 <= len(names) < IGNORED:
        raise ValueError(f"{file} must hold a list of 1 to {IGNORED - 1} class names")
    names = [str(name) for name in names]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{file} holds {twice[0]} twice: give each class its own name")
    return names


# The published one adds to brightness where ColorJitter multiplies; 18 of OpenCV's 180 hues: 0.1.
def _sometimes(**what: float) -> v2.Transform:
    return v2.RandomApply([v2.ColorJitter(**what)], p=0.5)  # type: ignore[arg-type]


_contrast = _sometimes(contrast=0.5)
_hue = [_sometimes(saturation=0.5), _sometimes(hue=0.1)]
DISTORT = v2.Compose(
    [
        _sometimes(brightness=32 / 255),
        v2.RandomChoice([v2.Compose([_contrast, *_hue]), v2.Compose([*_hue, _contrast])]),
    ]
)


def training_view(crop: int, short: int, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The published view: resize by 0.5 to 2, crop, flip, distort colors; float32 [3, crop, crop]
    and int64 [crop, crop]. Draws from torch's generator."""
    ratio = float(torch.empty(()).uniform_(0.5, 2.0))
    size = fitted(image.shape[1], image.shape[2], short * ratio, 4 * short * ratio)
    image = F.resize(image, size, antialias=False)
    labels = F.resize(labels[None], size, v2.InterpolationMode.NEAREST)[0]
    top = left = 0
    for _ in range(10):
        top, left = (int(torch.randint(max(0, side - crop) + 1, ())) for side in size)
        part = labels[top : top + crop, left : left + crop]
        counts = part[part != IGNORED].flatten().long().bincount()
        if (counts > 0).sum() > 1 and counts.max() < MOST_OF_ONE * counts.sum():
            break
    image = image[:, top : top + crop, left : left + crop]
    labels = labels[top : top + crop, left : left + crop]
    if torch.rand(()) < 0.5:
        image, labels = image.flip(-1), labels.flip(-1)
    below, right = crop - labels.shape[0], crop - labels.shape[1]
    padding = [0, 0, right, below]
    image = F.pad(normalized(DISTORT(image), "cpu"), padding)
    return image, F.pad(labels[None], padding, fill=IGNORED)[0].long()


def confusion(truth: Tensor, predicted: Tensor, classes: int, ignored: int) -> Tensor:
    """int64 [K, K], rows are true classes. Pixels whose truth is `ignored` do not count."""
    counted = truth != ignored
    pairs = truth[counted].long() * classes + predicted[counted].long()
    return torch.bincount(pairs.flatten(), minlength=classes**2).view(classes, classes)


def scores(matrix: np.ndarray, names: list[str]) -> dict[str, float]:
    """mIoU, mAcc (means over classes) and aAcc (over pixels) in percent, "majority_miou" of
    answering the most frequent class everywhere, and "iou/NAME" of each class.

    A class that occurs neither in truth nor in predictions has no IoU, one that does not occur in
    truth no accuracy; means leave them out. Raises ValueError where no pixel counts.
    """
    if not matrix.any():
        raise ValueError("--data: no pixel of the photos to evaluate on has a label")
    matrix = matrix.astype(np.float64)
    right, true, said = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    union = true + said - right
    iou = np.divide(100 * right, union, out=np.full_like(right, np.nan), where=union > 0)
    accuracy = np.divide(100 * right, true, out=np.full_like(right, np.nan), where=true > 0)
    result = {
        "miou": np.nanmean(iou),
        "macc": np.nanmean(accuracy),
        "aacc": 100 * right.sum() / matrix.sum(),
        "majority_miou": 100 * true.max() / true.sum() / (true > 0).sum(),
    }
    result |= {f"iou/{n}": v for n, v in zip(names, iou, strict=True) if not np.isnan(v)}
    return {name: float(value) for name, value in result.items()}
