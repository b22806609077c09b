"""Photos -> one feature vector each, by a frozen backbone: where every frozen evaluation starts.

The published evaluation view: shorter side resized to 256 (bicubic, as Pillow does it), centre
224 x 224, ImageNet mean and standard deviation; the feature is the class token of the last block
after the final norm.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pipeline.decode import UnreadablePhoto
from pipeline.photos import Photos, open_photos

log = logging.getLogger(__name__)

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of pixels on the 0..1 scale
STD = (0.229, 0.224, 0.225)

Sample = tuple[Tensor | None, int, str]  # uint8 [3, S, S] or None, label, why there is no image


def evaluation_view(image: Image.Image, size: int) -> Tensor:
    """The published evaluation view scaled to `size`: shorter side to 256, centre 224 at size 224.

    uint8 [3, size, size]. torchvision's Resize and CenterCrop in Pillow's words, as importing
    torchvision alone takes more than a third of the time that a run takes to load.
    """
    shorter = round(size * 256 / 224)
    sides = [shorter * side // min(image.size) for side in image.size]  # width, height
    left, top = (round((side - size) / 2) for side in sides)
    resized = image.resize((sides[0], sides[1]), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


class PhotoSet(Dataset[Sample]):
    """The labelled photos of a folder, a tar or a .beton file, as `size` x `size` evaluation views.

    `classes`: number the labels by these names (the training set's) instead of the set's own order.
    Sets that carry no names go by number. An unreadable photo is an item without image.

    Raises ValueError for a set without photos, with unlabelled photos, or with classes that
    `classes` lacks; FileNotFoundError for a missing path.
    """

    def __init__(self, path: str | Path, size: int = 224, classes: list[str] | None = None) -> None:
        if size < 1:
            raise ValueError(f"--image-size {size}: give the side of the evaluation view in pixels")
        self.path, self.size = Path(path), size
        self._photos: Photos | None = open_photos(path)
        self.classes = list(self._photos.classes)
        self.labels = np.asarray(self._photos.labels, dtype=np.int64)
        if not len(self.labels):
            raise ValueError(f"{path} holds no photos; give class folders or a .beton file")
        if self.labels.min() < 0:
            raise ValueError(
                f"{path} holds {(self.labels < 0).sum()} photos without a class; "
                "sort them into one folder a class"
            )
        if classes and self.classes:
            self._renumber(list(classes))

    def _renumber(self, classes: list[str]) -> None:
        unknown = [name for name in self.classes if name not in set(classes)]
        if unknown:
            raise ValueError(
                f"{self.path} has {len(unknown)} classes that the training set lacks "
                f"({', '.join(unknown[:3])}, ...); give two sets with the same class names"
            )
        number = {name: i for i, name in enumerate(classes)}
        self.labels = np.array([number[name] for name in self.classes])[self.labels]
        self.classes = classes

    @property
    def num_classes(self) -> int:
        return max(len(self.classes), int(self.labels.max()) + 1)

    def __getstate__(self) -> dict[str, object]:
        """A worker process opens the photos itself: file handles and maps do not travel."""
        return {**self.__dict__, "_photos": None}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        if self._photos is None:
            self._photos = open_photos(self.path)
        label = int(self.labels[index])
        try:
            pixels = self._photos.pixels(index)
        except UnreadablePhoto as reason:
            return None, label, f"{self._photos.name(index)}: {reason}"
        return evaluation_view(Image.fromarray(pixels), self.size), label, ""


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    """Return images uint8 [b, 3, S, S], labels int64 [b] and the reasons of the photos left out."""
    images = [image for image, _, _ in samples if image is not None]
    labels = [label for image, label, _ in samples if image is not None]
    reasons = [reason for image, _, reason in samples if image is None]
    stacked = torch.stack(images) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    return stacked, torch.tensor(labels, dtype=torch.int64), reasons


@contextmanager
def frozen(backbone: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is back in the mode it was in."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def extract_features(
    backbone: nn.Module,
    photos: PhotoSet,
    device: torch.device | str = "cpu",
    batch_size: int = 128,
    workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return class tokens float32 [n, C] and labels int64 [n], on the CPU, in the photos' order.

    backbone: images float32 [B, 3, S, S] on `device` -> tokens [B, 1 + N, C], class token first.
    workers: processes that decode; 0 decodes in this one. Unreadable photos are left out: each is
    logged by name, then counted. Raises ValueError if none can be read.
    """
    loader = DataLoader(
        photos,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.device(device).type == "cuda",
        # The training loader's threads may hold locks, which a forked process would inherit locked.
        multiprocessing_context="spawn" if workers else None,
    )
    mean, std = (torch.tensor(c, device=device).view(3, 1, 1) for c in (MEAN, STD))
    # NumPy's memory: tensors made in inference mode would be barred from training on them.
    features, labels = np.empty((0, 0), np.float32), np.empty(len(photos), np.int64)
    read = lost = 0
    with frozen(backbone):
        for images, batch_labels, reasons in loader:
            for reason in reasons:
                log.warning("left out of the evaluation: %s", reason)
            lost += len(reasons)
            if not len(images):
                continue
            images = images.to(device, non_blocking=True).float().div_(255).sub_(mean).div_(std)
            tokens = backbone(images)[:, 0]  # [b, C]
            if not len(features):
                features = np.empty((len(photos), tokens.shape[1]), np.float32)  # [n, C]
            rows = slice(read, read + len(tokens))
            features[rows], labels[rows] = tokens.float().cpu().numpy(), batch_labels.numpy()
            read += len(tokens)
    if not read:
        raise ValueError(f"none of the {len(photos)} photos of {photos.path} can be read")
    if lost:
        log.warning("%d of %d photos of %s left out", lost, len(photos), photos.path)
    return torch.from_numpy(features[:read]), torch.from_numpy(labels[:read])
