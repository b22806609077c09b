"""Which files are plain JPEGs, for any decoder, and which are left to Pillow."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from smooth_photos import smooth_photo

from ibeton.pipeline.store.jpeg import MAX_PIXELS, plain_jpeg_size

PHOTO = smooth_photo(np.random.default_rng(3), 70, 50)


def encoded(image: Image.Image = PHOTO, format: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


PLAIN = encoded()
SIZE = PLAIN.index(b"\xff\xc0") + 5  # where height and width stand


@pytest.mark.parametrize(
    "data",
    [
        PLAIN,
        encoded(PHOTO.convert("L")),
        encoded(progressive=True),
        encoded(subsampling=0, quality=100),
        encoded(restart_marker_blocks=1),
        encoded(comment=b"\xff\xd9 is no end here", icc_profile=bytes(100_000)),
    ],
    ids=["plain", "gray", "progressive", "444", "restarts", "comment"],
)
def test_plain_jpegs_tell_their_size(data: bytes) -> None:
    assert plain_jpeg_size(data) == plain_jpeg_size(memoryview(data)) == (50, 70)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff\xd9",
        b"<html>404 Not Found</html>",
        encoded(format="PNG"),
        encoded(PHOTO.convert("CMYK")),
        encoded(keep_rgb=True),
        PLAIN + b"?",
        PLAIN[:2] + PLAIN,
        PLAIN[:-300] + b"\xff\x5c" + PLAIN[-298:],  # a marker inside the compressed data
        PLAIN[:-2] + PLAIN,
        PLAIN[:SIZE] + bytes(2) + PLAIN[SIZE + 2 :],  # a height of 0: it comes behind the scan
        PLAIN[:SIZE] + 2 * b"\xff\xf0" + PLAIN[SIZE + 4 :],
    ],
)
def test_all_else_is_left_to_pillow(data: bytes) -> None:
    assert MAX_PIXELS < 0xFFF0**2  # of the last one
    assert plain_jpeg_size(data) is None


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_jpeg_cut_short_is_not_plain(options: dict[str, bool]) -> None:
    data = encoded(**options)
    for length in range(len(data)):
        assert plain_jpeg_size(data[:length]) is None


def test_no_damage_makes_it_fail() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        data = bytearray(PLAIN)
        for place in rng.integers(0, 700, 4):
            data[place] = rng.integers(0, 256)
        plain_jpeg_size(bytes(data))
