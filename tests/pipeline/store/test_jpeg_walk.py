"""What the walk calls whole, Pillow decodes to its end: over damage of every kind."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from smooth_photos import smooth_photo

from ibeton.pipeline.store.jpeg import whole_jpeg_size

SETTINGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "full_chroma": {"subsampling": 0},
    "restarts": {"restart_marker_blocks": 4},
    "own_codes": {"optimize": True},
    "profile": {"icc_profile": b"x" * 70_000, "comment": b"\xff\xd9 is no end here"},
}


def jpeg(seed: int = 0, mode: str = "RGB", **settings: object) -> bytes:
    file = io.BytesIO()
    photo = smooth_photo(np.random.default_rng(seed), 90 + seed, 70)
    photo.convert(mode).save(file, "JPEG", **settings)
    return file.getvalue()


def pillow_says(data: bytes) -> Image.Image | None:
    """The image, which may be gray where data are missing, or None."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception:
        return None
    return image


@pytest.mark.parametrize("name", SETTINGS)
def test_usual_jpegs_are_known_with_their_size(name: str) -> None:
    data = jpeg(5, **SETTINGS[name])
    assert whole_jpeg_size(data) == (95, 70)
    assert whole_jpeg_size(data + b"behind the end") == (95, 70)


def test_gray_is_known_and_other_colors_are_left_to_a_decode() -> None:
    assert whole_jpeg_size(jpeg(mode="L")) == (90, 70)
    assert whole_jpeg_size(jpeg(mode="CMYK")) is None


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"GIF89a" * 9])
def test_what_is_no_photo_is_not_whole(data: bytes) -> None:
    assert whole_jpeg_size(data) is None


@pytest.mark.parametrize("name", SETTINGS)
def test_a_file_cut_anywhere_is_not_whole(name: str) -> None:
    data = jpeg(**SETTINGS[name])
    for length in (*range(0, len(data), 7), len(data) - 2, len(data) - 1):
        assert whole_jpeg_size(data[:length]) is None


def without(data: bytes, marker: int) -> bytes:
    """The JPEG without its segments of that kind."""
    place, kept = 2, data[:2]
    while data[place + 1] != 0xDA:
        length = 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        kept += data[place : place + length] if data[place + 1] != marker else b""
        place += length
    return kept + data[place:]


@pytest.mark.parametrize("marker", [0xC0, 0xC4, 0xDB], ids=["frame", "codes", "quantisation"])
def test_a_missing_table_is_noticed(marker: int) -> None:
    assert whole_jpeg_size(without(jpeg(), 0xE0)) is not None
    assert whole_jpeg_size(without(jpeg(), marker)) is None


DAMAGE: dict[str, Callable[[bytearray, np.random.Generator], bytearray]] = {
    "cut": lambda data, rng: data[: rng.integers(len(data))],
    "bit": lambda data, rng: changed(data, rng, len(data), 1),
    "header bit": lambda data, rng: changed(data, rng, 620, 1),
    "header bytes": lambda data, rng: changed(data, rng, 620, 4),
    "block": lambda data, rng: changed(data, rng, len(data), 100),
    "lost": lambda data, rng: data[: (at := rng.integers(len(data)))] + data[at + 50 :],
    "put in": lambda data, rng: data[: (at := rng.integers(620))] + rng.bytes(5) + data[at:],
}


def changed(data: bytearray, rng: np.random.Generator, before: int, count: int) -> bytearray:
    """`count` bytes at random, or one bit."""
    at = int(rng.integers(min(before, len(data))))
    if count == 1:
        data[at] ^= 1 << int(rng.integers(8))
    else:
        data[at : at + count] = rng.bytes(len(data[at : at + count]))
    return data


@pytest.mark.parametrize("kind", DAMAGE)
def test_no_damage_that_pillow_refuses_passes(kind: str) -> None:
    rng = np.random.default_rng(list(DAMAGE).index(kind))
    photos = [jpeg(seed, **SETTINGS[name]) for seed, name in enumerate(list(SETTINGS)[:5])]
    refused = 0
    for i in range(300):
        data = bytes(DAMAGE[kind](bytearray(photos[i % len(photos)]), rng))
        size, image = whole_jpeg_size(data), pillow_says(data)
        refused += image is None
        if size:
            assert image is not None, (kind, i)
            assert (image.size, image.mode) == (size, "RGB"), (kind, i)
    assert refused or kind == "bit"


def test_nearly_all_photos_are_spared_the_decode(camera: list[Path]) -> None:
    sizes = []
    for path in camera:
        with Image.open(path) as image:
            sizes.append(image.size)
    found = [whole_jpeg_size(path.read_bytes()) for path in camera]
    assert found == sizes
