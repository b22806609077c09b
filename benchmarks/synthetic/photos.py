"""A small labeled set of synthetic photos, for a first run without photos.

    python -m benchmarks.synthetic.photos DST

It writes DST/train/<class>/00000.jpg and DST/val/<class>/00000.jpg.

Ten classes of shape, from branches to waves, each printed over and over, as on a cloth: every part
of a photo shows its class. Size, pose, colors, surfaces, light and clutter are drawn from the same
distributions for every class, and all photos are exposed alike, so only the shape tells them apart.
A photo depends only on (seed, split, class, number). DST/train and DST/val appear when they are
complete.
"""

import shutil
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from ibeton.benchmarks.synthetic.shapes import SHAPES, Rng, Shape, disc, ribbon, rotation
from ibeton.command import run_command
from ibeton.options import Parser, add_options, fill, option, refuse, too_low
from ibeton.progress import progress

SPLITS = ("train", "val")
_FINE = 2  # polygons are drawn so many times larger, then averaged down: smooth edges
_LUMA = np.array((0.299, 0.587, 0.114))  # ITU-R BT.601
_BLACK = (0, 0, 0)
_EXPOSURE, _CONTRAST = 128, 50  # mean and standard deviation of every photo's brightness
_STEP = (0.36, 0.55)  # from one print to the next, over the photo's shorter side
_FILL = (0.42, 0.5)  # radius of a print over the step
_STRAY = 0.06  # of a print from its place, over the step
_TILT = 0.3  # radians: a cloth hangs straight, give or take

CLASSES = tuple(SHAPES)  # in the order of their labels


@dataclass(frozen=True)
class SyntheticOptions:
    """How many photos to draw."""

    images_per_class: int = option(300, "train photos per class")
    val_per_class: int = option(50, "val photos per class")
    seed: int = option(0, "another seed draws other photos")
    contact_sheet: str = option("", "PNG to write: a row of train photos per class")

    def check(self) -> None:
        """Raise ValueError, naming the option, for values that cannot work."""
        refuse(too_low(self, {("images_per_class", "val_per_class"): 1, ("seed",): 0}))
        if self.contact_sheet and not self.contact_sheet.lower().endswith(".png"):
            raise ValueError(
                f"--contact-sheet {self.contact_sheet}: expected a name ending in .png"
            )


def _placed(shape: Shape, rng: Rng, x: float, y: float, radius: float, tilt: float) -> Shape:
    """The shape, stretched and turned at random, about (x, y) in pixels."""
    stretch = np.exp(rng.uniform(-0.18, 0.18))
    pose = radius * rotation(rng.uniform(-tilt, tilt)) @ np.diag((stretch, 1 / stretch))
    return [(points @ pose.T + (x, y), adds) for points, adds in shape]


def _subject(rng: Rng, kind: str, width: int, height: int) -> Shape:
    """The class's shape over and over, as printed on a cloth: in rows that start anywhere."""
    side = min(width, height)
    step = side * rng.uniform(*_STEP)
    radius = step * rng.uniform(*_FILL)
    turn = rotation(rng.uniform(-_TILT, _TILT))
    start, odd = rng.uniform(0, 1, 2), 0.5 * rng.integers(2)
    reach = int(np.ceil(max(width, height) / step)) + 1
    placed: Shape = []
    for row in range(-reach, reach):
        for column in range(-reach, reach):
            spot = (
                start + np.array([column + odd * (row % 2), row]) + rng.uniform(-_STRAY, _STRAY, 2)
            )
            x, y = turn @ spot * step + (width / 2, height / 2)
            if -radius < x < width + radius and -radius < y < height + radius:
                placed += _placed(SHAPES[kind](rng), rng, x, y, radius, _TILT)
    return placed


def _clutter(rng: Rng, width: int, height: int, count: int, largest: float) -> Shape:
    """Lumps and sticks anywhere; `largest` is relative to the shorter side."""
    placed: Shape = []
    for _ in range(count):
        t = np.linspace(-1, 1, 16)
        if rng.random() < 0.5:
            points = disc(0, 0, 1.0)
            bumps = rng.uniform(-0.25, 0.25, (2, 3)) @ np.sin(
                np.outer((2, 3, 4), np.arange(40) / 6.4)
            )
            points = points * (1 + bumps.mean(0))[:, None] * (1, rng.uniform(0.4, 1))
        else:
            points = ribbon(np.stack((t, rng.uniform(-0.5, 0.5) * t**2), 1), rng.uniform(0.1, 0.25))
        x, y = rng.uniform(0, (width, height))
        radius = min(width, height) * largest * rng.uniform(0.4, 1)
        placed += _placed([(points, True)], rng, x, y, radius, np.pi)
    return placed


def _color(rng: Rng, luma: float) -> np.ndarray:
    """A pale color of that brightness. Strong ones would tell the photos apart by themselves, and
    a network that learns by telling photos apart would never look at the shapes."""
    tint = rng.uniform(-1, 1, 3) * 10
    return (luma + tint - _LUMA @ tint).clip(0, 255)


def _surface(rng: Rng, width: int, height: int, luma: float) -> Image.Image:
    """Two colors near that brightness, in a gradient, two halves, or patches."""
    ends = [_color(rng, np.clip(luma + rng.uniform(-12, 12), 3, 252)) for _ in range(2)]
    kind, angle = rng.integers(3), rng.uniform(0, 2 * np.pi)
    if kind == 2:
        coarse = rng.integers(0, 256, rng.integers(3, 12, 2), dtype=np.uint8)
        mix = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    else:
        x, y = np.arange(width) / width - 0.5, np.arange(height)[:, None] / height - 0.5
        ramp = np.cos(angle) * x + np.sin(angle) * y + rng.uniform(-0.2, 0.2)
        ramp = ramp * (1.0 if kind == 0 else 60.0) + 0.5
        mix = Image.fromarray((ramp.clip(0, 1) * 255).astype(np.uint8))
    first, second = (
        Image.new("RGB", (width, height), tuple(int(c) for c in rgb.round())) for rgb in ends
    )
    return Image.composite(first, second, mix)


def _cover(shape: Shape, width: int, height: int) -> Image.Image:
    """How much of each pixel the shape covers, 0 to 255."""
    fine = Image.new("L", (width * _FINE, height * _FINE))
    pen = ImageDraw.Draw(fine)
    for points, adds in shape:
        pen.polygon((points * _FINE).ravel().tolist(), fill=255 if adds else 0)
    return fine.reduce(_FINE)


def make_photo(seed: int, split: str, kind: str, number: int) -> Image.Image:
    """Photo `number` of class `kind`: RGB, sides of 80 to 240 pixels.

    Raises ValueError for a split that is not in SPLITS or a class that is not in CLASSES.
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), CLASSES.index(kind), number))
    area, aspect = rng.uniform(96, 176) ** 2, np.exp(rng.uniform(-0.5, 0.5))
    width, height = (
        int(np.clip(side, 80, 240)) for side in np.sqrt((area * aspect, area / aspect))
    )
    ground = rng.uniform(175, 215)
    photo = _surface(rng, width, height, ground)
    for _ in range(int(rng.integers(1, 4))):
        cover = _cover(_clutter(rng, width, height, int(rng.integers(1, 4)), 0.3), width, height)
        luma = ground + rng.uniform(-20, 20)
        photo.paste(_surface(rng, width, height, luma), mask=cover)
    cover = _cover(_subject(rng, kind, width, height), width, height)
    if rng.random() < 0.5:
        _cast_shadow(rng, photo, cover)
    photo.paste(_surface(rng, width, height, ground - rng.uniform(95, 115)), mask=cover)
    front = _clutter(rng, width, height, int(rng.integers(0, 3)), 0.16)
    photo.paste(
        _surface(rng, width, height, ground - rng.uniform(0, 110)),
        mask=_cover(front, width, height),
    )
    return _developed(rng, photo)


def _cast_shadow(rng: Rng, photo: Image.Image, cover: Image.Image) -> None:
    dx, dy = (int(shift) for shift in rng.integers(-8, 9, 2))
    soft = cover.filter(ImageFilter.BoxBlur(3)).point([int(v * 0.45) for v in range(256)])
    photo.paste(_BLACK, (dx, dy), mask=soft)


def _developed(rng: Rng, photo: Image.Image) -> Image.Image:
    """Uneven light, the grain of a sensor, and the exposure of a camera: every photo has the same
    mean brightness and contrast. Else brightness alone would tell photos apart, as color would."""
    width, height = photo.size
    fall, angle = rng.uniform(0, 0.35), rng.uniform(0, 2 * np.pi)
    x, y = np.arange(width) / width - 0.5, np.arange(height)[:, None] / height - 0.5
    light = (1 + fall * (np.cos(angle) * x + np.sin(angle) * y)).astype(np.float32)
    grain = rng.standard_normal((height, width), np.float32) * np.float32(rng.uniform(1, 8))
    pixels = np.asarray(photo) * light[..., None] + grain[..., None]
    luma = pixels @ _LUMA
    pixels = (pixels - luma.mean()) * (_CONTRAST / luma.std()) + _EXPOSURE
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_photos(dst: str | Path, options: SyntheticOptions | None = None) -> None:
    """Write train and val photos of every class below `dst`, and the contact sheet if one is named.

    Raises ValueError for bad options, FileExistsError for a train or val that holds anything or a
    contact sheet that exists, FileNotFoundError for a contact sheet in a missing folder. Whatever
    is raised, no partial train or val is left.
    """
    options = options or SyntheticOptions()
    options.check()
    dst = Path(dst)
    _check_free(dst, options.contact_sheet)
    counts = dict(zip(SPLITS, (options.images_per_class, options.val_per_class), strict=True))
    dst.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".drawing-", dir=dst))
    try:
        with progress("draw", len(CLASSES) * sum(counts.values())) as advance:
            for (split, count), kind in product(counts.items(), CLASSES):
                folder = partial / split / kind
                folder.mkdir(parents=True)
                for number in range(count):
                    photo = make_photo(options.seed, split, kind, number)
                    quality = 85 + (7 * number + options.seed) % 11
                    photo.save(folder / f"{number:05d}.jpg", "JPEG", quality=quality)
                    advance(1)
        if options.contact_sheet:
            contact_sheet(partial / "train").save(options.contact_sheet)
        for split in SPLITS:
            (partial / split).rename(dst / split)  # replaces an empty folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_free(dst: Path, sheet: str) -> None:
    for folder in (dst / split for split in SPLITS):
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise FileExistsError(
                f"{folder} exists and is not empty; remove it or give another DST"
            )
    if sheet and not Path(sheet).parent.is_dir():
        raise FileNotFoundError(f"--contact-sheet: the folder {Path(sheet).parent} does not exist")
    if sheet and Path(sheet).exists():
        raise FileExistsError(f"--contact-sheet: {sheet} exists; remove it or give another name")


def contact_sheet(train: Path, columns: int = 8, cell: int = 112) -> Image.Image:
    """The first photos of every class folder of `train`, a row a class with its name."""
    gap, margin = 6, 92
    size = (margin + columns * (cell + gap), gap + len(CLASSES) * (cell + gap))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for row, kind in enumerate(CLASSES):
        top = gap + row * (cell + gap)
        pen.text((12, top + cell // 2), kind, "black", font, anchor="lm")
        for column, path in enumerate(sorted((train / kind).iterdir())[:columns]):
            with Image.open(path) as photo:
                small = ImageOps.contain(photo, (cell, cell), Image.Resampling.LANCZOS)
            left = margin + column * (cell + gap)
            sheet.paste(small, (left + (cell - small.width) // 2, top + (cell - small.height) // 2))
    return sheet


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for bad input, 1 for a failure on the way."""
    about = (__doc__ or "").split("\n")[0]
    parser = Parser(prog="python -m benchmarks.synthetic.photos", description=about)
    parser.add_argument("dst", help="the folder to draw train/ and val/ into")
    add_options(parser, SyntheticOptions)
    given = vars(parser.parse_args(argv))
    options = fill(SyntheticOptions, given)

    def draw() -> int:
        make_photos(given["dst"], options)
        train, val = options.images_per_class, options.val_per_class
        print(
            f"{given['dst']}: {len(CLASSES)} classes, {train:,} train, {val:,} val photos of each"
        )
        return 0

    return run_command(draw)


if __name__ == "__main__":
    sys.exit(main())
