"""Labeled photos -> batches of views, decoded by threads while the caller computes.

The published evaluation view: shorter side resized to 256 (bicubic, as Pillow does it), center
224 x 224. The published view for training a linear layer: a random crop of 8 to 100 % of the photo,
resized (bilinear), and a flip; its draws follow from (epoch, photo).

Threads suffice, as Pillow decodes and resizes without the GIL; processes would have to start first,
and to send every view through a pipe.
"""

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ibeton.pipeline.store.decode import UnreadablePhoto, load_photo, to_rgb
from ibeton.pipeline.store.photos import Photos, open_fast, typical_side
from ibeton.workers import cores, in_threads

LINEAR_SCALE = (0.08, 1.0)  # share of the photo's area that a crop for linear probing has
STORED = 224  # side that the photos of ImageNet-C and of the backgrounds challenge have
_LONGEST = 8  # longer side over the shorter one that a photo is resized with
_JOB = 8  # photos that a thread takes at a time
_PIXELS_A_THREAD = 8_000
_AHEAD = 2  # batches that are being filled, or ready, beside the one that is asked for

View = Callable[[Image.Image, int], Tensor]  # photo, side -> uint8 [3, side, side]
Sample = tuple[Tensor | None, int, str]  # uint8 [3, S, S] or None, label, why there is no image
Made = TypeVar("Made")


def evaluation_view(
    image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Tensor:
    """The published evaluation view scaled to `size`: shorter side to 256, center 224 at size 224.

    uint8 [3, size, size]. torchvision's Resize and CenterCrop with Pillow, as importing
    torchvision alone takes more than a third of the time that a run takes to load.
    """
    image = _without_ends(image)
    shorter = round(size * 256 / 224)
    sides = [shorter * side // min(image.size) for side in image.size]  # width, height
    left, top = (round((side - size) / 2) for side in sides)
    resized = image.resize((sides[0], sides[1]), resample)
    return planes(resized.crop((left, top, left + size, top + size)))


def _without_ends(image: Image.Image) -> Image.Image:
    """The middle of a very thin photo: resized whole, one of 2 x 8,000 pixels takes 1.6 GB. Other
    photos as they are."""
    width, height = image.size
    cut = (max(image.size) - _LONGEST * min(image.size)) // 2
    if cut <= 0:
        return image
    box = (cut, 0, width - cut, height) if width > height else (0, cut, width, height - cut)
    return image.crop(box)


def bilinear_view(image: Image.Image, size: int) -> Tensor:
    """The evaluation view, resized bilinearly, uint8 [3, size, size]."""
    return evaluation_view(image, size, Image.Resampling.BILINEAR)


EVALUATION_VIEWS: dict[str, View] = {"bicubic": evaluation_view, "bilinear": bilinear_view}


def center_view(image: Image.Image, size: int) -> Tensor:
    """The center STORED x STORED pixels of a photo (all of a smaller one) as they are, or resized
    bilinearly for another `size`: uint8 [3, size, size]."""
    side = min(STORED, *image.size)
    left, top = (round((length - side) / 2) for length in image.size)
    view = image.crop((left, top, left + side, top + side))
    return planes(view if side == size else view.resize((size, size), Image.Resampling.BILINEAR))


def square_view(image: Image.Image, size: int) -> Tensor:
    """The whole photo, squeezed to a square, uint8 [3, size, size]."""
    return planes(image.resize((size, size), Image.Resampling.BICUBIC))


def random_view(image: Image.Image, size: int, epoch: int, index: int) -> Tensor:
    """A random resized crop and flip, uint8 [3, size, size], drawn from (epoch, index)."""
    from ibeton.pipeline.sampling.draws import ViewSpec, draw_views  # numba takes seconds

    spec = ViewSpec(size, LINEAR_SCALE, blur_p=0.0, solarize_p=0.0)
    draw = draw_views([spec], 0, epoch, index, image.height, image.width)[0]
    left, top = int(draw["left"]), int(draw["top"])
    box = (left, top, left + int(draw["width"]), top + int(draw["height"]))
    view = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
    return planes(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw["flip"] else view)


def planes(image: Image.Image) -> Tensor:
    """The pixels of an RGB image, uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def opened(path: Path) -> Image.Image:
    """The photo or label map in a file, in its own mode. Raises ValueError or FileNotFoundError
    that names the file."""
    try:
        return load_photo(path.read_bytes())
    except UnreadablePhoto as reason:
        raise ValueError(f"{path} cannot be read: {reason}") from reason


def opened_rgb(path: Path) -> Image.Image:
    """The photo in a file, in RGB. Raises as `opened`."""
    return to_rgb(opened(path))


def text_of(path: Path) -> str:
    """The text of a file. Raises ValueError that names it for one of another kind."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file ({error})") from error


def open_checked(path: str | Path, labeled: bool = True) -> Photos:
    """The photos of a folder, a tar or a .beton file. Raises FileNotFoundError for a missing path,
    ValueError where there are none and, if `labeled`, where some have no class."""
    photos = open_fast(path)
    if not len(photos):
        raise ValueError(f"{path} holds no photos; give class folders or a .beton file")
    if labeled and photos.labels.min() < 0:
        raise ValueError(
            f"{path} holds {(photos.labels < 0).sum()} photos without a class; sort them into one"
            " folder per class"
        )
    return photos


def check_classes(classes: int, train: object, val: object) -> None:
    """Raise ValueError for fewer than two classes."""
    if classes < 2:
        raise ValueError(
            f"{train} and {val} contain a single class, so every prediction is correct; give at"
            " least two classes"
        )


def note_if_same(train: str | Path, val: str | Path) -> str:
    """A line for the user if both sets are the same photos, else ""."""
    if os.path.realpath(train) != os.path.realpath(val):
        return ""
    return (
        f"--train and --val are both {val}: each photo is seen in training, so the scores do not"
        " measure generalization"
    )


def labels_by_name(path: str | Path, photos: Photos, classes: list[str]) -> np.ndarray:
    """The photos' labels as numbers of `classes`, int64 [n]. Raises ValueError for classes that are
    not among them."""
    unknown = [name for name in photos.classes if name not in set(classes)]
    if unknown:
        raise ValueError(
            f"{path} has {len(unknown)} classes that the training set lacks ({some(unknown)}); give"
            " two sets of the same classes"
        )
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[name] for name in photos.classes], np.int64)[photos.labels]


def some(names: list[str]) -> str:
    """The first three of `names`."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


class PhotoViews:
    """Photos as views of `size` x `size` pixels, which `view` cuts. An unreadable photo is an item
    without image."""

    def __init__(self, photos: Photos, size: int, view: View) -> None:
        self.photos, self.size, self.view = photos, size, view
        self.labels = np.asarray(photos.labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index)

    def sample(self, index: int, epoch: int | None = None) -> Sample:
        """The view of a photo, or with `epoch` the random one of that epoch."""
        label = int(self.labels[index])
        try:
            image = Image.fromarray(self.photos.pixels(index))
        except UnreadablePhoto as reason:
            return None, label, f"{self.name(index)}: {reason}"
        if epoch is None:
            return self.view(image, self.size), label, ""
        return random_view(image, self.size, epoch, index), label, ""

    def name(self, index: int) -> str:
        """What to call a photo: its path below the set."""
        return self.photos.name(index)

    @cached_property
    def threads(self) -> int:
        """How many threads decode fastest. Around Pillow's work a photo takes as much Python as
        8,000 pixels take to decode, and threads that are not needed make it slower: 16 of them
        gave 2,100 photos/s of 32 x 32 pixels, where one gave 5,200."""
        return min(cores(), 1 + typical_side(self.photos) ** 2 // _PIXELS_A_THREAD)


class PhotoSet(PhotoViews):
    """The labeled photos of a folder, a tar or a .beton file, as `size` x `size` evaluation views,
    or as `view` cuts them.

    `classes`: number the labels by these names (the training set's) instead of the set's own order.
    Sets that carry no names go by number. `labeled` False: photos need no class.

    Raises ValueError for a set without photos, with unlabeled photos, or with classes that
    `classes` lacks; FileNotFoundError for a missing path.
    """

    def __init__(
        self,
        path: str | Path,
        size: int = 224,
        classes: list[str] | None = None,
        view: View = evaluation_view,
        labeled: bool = True,
    ) -> None:
        if size < 1:
            raise ValueError(f"--image-size {size}: give the side of the evaluation view in pixels")
        super().__init__(open_checked(path, labeled), size, view)
        self.path, self.classes = Path(path), list(self.photos.classes)
        if classes and self.classes:
            self.labels = labels_by_name(path, self.photos, classes)
            self.classes = list(classes)

    @property
    def num_classes(self) -> int:
        return max(len(self.classes), int(self.labels.max()) + 1)

    def fingerprint(self) -> str:
        """A name for the photos' contents and order that changes with every write to any of them.

        It is made of names, sizes, inodes and times. The time of the last change (ctime) is the
        kernel's own and cannot be set back, so that no byte has to be read.
        """
        digest = hashlib.sha256(self.view.__name__.encode())
        if self.path.is_file():
            digest.update(_state_of(str(self.path)))
            return digest.hexdigest()
        for index in range(len(self)):
            name = self.name(index)
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
            digest.update(_state_of(os.path.join(self.path, name)))
        return digest.hexdigest()


def _state_of(path: str) -> bytes:
    try:
        stat = os.stat(path)
    except OSError as error:
        return f"errno {error.errno};".encode()
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino};".encode()


@dataclass
class ViewBatch:
    """Some views of a `PhotoSet`."""

    images: Tensor  # uint8 [b, 3, S, S], on the CPU
    indices: np.ndarray  # int64 [b], which photos they are
    unreadable: list[str]  # the names of those left out, with reasons


def view_batches(
    photos: PhotoViews,
    indices: Sequence[int] | np.ndarray,
    batch_size: int,
    threads: int = 0,
    epoch: int | None = None,
    pinned: bool = False,
) -> Generator[ViewBatch, None, None]:
    """The views of photos `indices`, in their order, `batch_size` at a time.

    `threads` decode (0: `photos.threads`), at most three batches ahead. `epoch`: random views of
    that epoch instead of evaluation views. `pinned`: in page-locked memory.
    """
    indices = np.asarray(indices, dtype=np.int64)

    def allocate(count: int) -> Tensor:  # as Pillow has views; the device turns them into planes
        shape = (count, photos.size, photos.size, 3)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)

    def decode(rows: np.ndarray, out: np.ndarray) -> list[str]:
        """Views of photos `rows` into `out` uint8 [rows, S, S, 3]; for each, why there is none."""
        reasons = []
        for index, place in zip(rows.tolist(), out, strict=True):
            view, _, reason = photos.sample(index, epoch)
            reasons.append(reason)
            if view is not None:
                place[:] = view.permute(1, 2, 0).numpy()
        return reasons

    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    with closing(filled_batches(batches, allocate, decode, threads or photos.threads)) as filled:
        for rows, out, reasons in filled:
            kept = np.array([not reason for reason in reasons])
            images, unreadable = out.permute(0, 3, 1, 2), [reason for reason in reasons if reason]
            if unreadable:
                images, rows = images[torch.from_numpy(kept)], rows[kept]
            yield ViewBatch(images, rows, unreadable)


def filled_batches(
    batches: Sequence[np.ndarray],  # the photos of each, int64 [b]
    allocate: Callable[[int], Tensor],  # a batch of so many photos
    fill: Callable[[np.ndarray, np.ndarray], list[Made]],
    threads: int,
) -> Generator[tuple[np.ndarray, Tensor, list[Made]], None, None]:
    """Batches in their order, filled by threads (0: one per core), three at most at a time: photos,
    what was allocated, and for each photo what `fill(photos, memory)` returned."""
    under_way: deque[Tensor] = deque()

    def jobs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for rows in batches:
            under_way.append(allocate(len(rows)))
            memory = under_way[-1].numpy()
            for i in range(0, len(rows), _JOB):
                yield rows[i : i + _JOB], memory[i : i + _JOB]

    most = _AHEAD * max((-(-len(rows) // _JOB) for rows in batches), default=1)
    with closing(in_threads(lambda job: fill(*job), jobs(), threads or cores(), most)) as results:
        for rows in batches:
            parts = itertools.islice(results, -(-len(rows) // _JOB))
            made = [one for part in parts for one in part]
            yield rows, under_way.popleft(), made
