"""Photos to measure on where none are given."""

from pathlib import Path

from ibeton.benchmarks.synthetic.photos import SyntheticOptions, make_photos
from ibeton.pipeline.convert import ConvertOptions, convert


def synthetic_beton(folder: Path, images_per_class: int = 12) -> str:
    """A .beton file in `folder` of synthetic photos, ten classes of them."""
    options = SyntheticOptions(images_per_class=images_per_class, val_per_class=1)
    make_photos(folder / "drawn", options)
    convert(folder / "drawn" / "train", folder / "drawn.beton", ConvertOptions())
    return str(folder / "drawn.beton")
