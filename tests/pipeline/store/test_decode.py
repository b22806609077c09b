"""Every kind of photo decodes to the RGB that the published recipe sees, or says why not."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ibeton.pipeline.store.decode import UnreadablePhoto, decode_photo, load_photo
from ibeton.pipeline.store.jpeg import MAX_PIXELS

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
SMOOTH = Image.fromarray(PHOTO[:3, :4]).resize((60, 40), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_their_pixels(format: str) -> None:
    pixels = decode_photo(encoded(Image.fromarray(PHOTO), format))
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels, PHOTO)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"subsampling": 0, "quality": 95}),
        ("WEBP", {"quality": 90}),
    ],
)
def test_lossy_formats_stay_near_the_photo(format: str, options: dict[str, object]) -> None:
    pixels = decode_photo(encoded(SMOOTH, format, **options)).astype(int)
    assert np.abs(pixels - np.asarray(SMOOTH)).mean() < 6


def test_gray_becomes_three_equal_channels() -> None:
    gray = SMOOTH.convert("L")
    for format in ("PNG", "JPEG"):
        pixels = decode_photo(encoded(gray, format))
        assert pixels.shape == (40, 60, 3)
        assert (pixels == pixels[..., :1]).all()
        assert np.abs(pixels[..., 0].astype(int) - np.asarray(gray)).mean() < 6


def test_cmyk_becomes_the_colors_it_prints() -> None:
    paper, cyan = (Image.new("CMYK", (16, 16), ink) for ink in ((0, 0, 0, 0), (255, 0, 0, 0)))
    assert decode_photo(encoded(paper, "JPEG")).min() >= 250
    red, green, blue = decode_photo(encoded(cyan, "JPEG"))[8, 8].astype(int)
    assert red <= 5
    assert min(green, blue) >= 250


def test_alpha_is_dropped_not_blended() -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (40, 60, 1), dtype=np.uint8)
    image = Image.fromarray(np.concatenate([PHOTO, alpha], axis=2))
    assert image.mode == "RGBA"
    np.testing.assert_array_equal(decode_photo(encoded(image, "PNG")), PHOTO)


def test_palettes_are_looked_up() -> None:
    palette = SMOOTH.quantize(32)
    expected = np.array(palette.convert("RGB"))
    for format, options in (("PNG", {}), ("GIF", {}), ("PNG", {"transparency": 3})):
        pixels = decode_photo(encoded(palette, format, **options))
        np.testing.assert_array_equal(pixels, expected)


def test_two_level_images_are_black_and_white() -> None:
    bilevel = SMOOTH.convert("1")
    pixels = decode_photo(encoded(bilevel, "PNG"))
    np.testing.assert_array_equal(pixels[..., 1] == 255, np.asarray(bilevel))
    assert set(np.unique(pixels)) == {0, 255}


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_gray_is_scaled_not_clipped(format: str) -> None:
    gray = np.linspace(0, 65535, 40 * 60).round().astype(np.uint16).reshape(40, 60)
    pixels = decode_photo(encoded(Image.fromarray(gray), format))
    np.testing.assert_array_equal(pixels[..., 2], np.round(gray / 257).astype(np.uint8))
    assert (pixels == pixels[..., :1]).all()


def test_gray_beyond_sixteen_bits_and_floats_are_refused() -> None:
    wide = Image.fromarray(np.full((4, 4), 70_000, np.int32))
    with pytest.raises(UnreadablePhoto, match=r"70000\.\.70000 do not fit 16 bits"):
        decode_photo(encoded(wide, "TIFF"))
    floats = Image.fromarray(np.ones((4, 4), np.float32))
    with pytest.raises(UnreadablePhoto, match="floating-point"):
        decode_photo(encoded(floats, "TIFF"))


def test_the_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    turned = encoded(SMOOTH, "JPEG", exif=exif)
    assert b"Exif" in turned
    np.testing.assert_array_equal(decode_photo(turned), decode_photo(encoded(SMOOTH, "JPEG")))


def test_one_pixel_and_extreme_shapes_decode() -> None:
    for size in ((1, 1), (3, 300), (2000, 2)):
        pixels = decode_photo(encoded(Image.new("RGB", size, (200, 100, 50)), "JPEG"))
        assert pixels.shape == (size[1], size[0], 3)
        assert np.abs(pixels.astype(int) - (200, 100, 50)).max() <= 3


def test_bytes_and_memoryviews_are_one(tmp_path: Path) -> None:
    data = encoded(SMOOTH, "JPEG")
    np.testing.assert_array_equal(decode_photo(memoryview(data)), decode_photo(data))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_a_photo_cut_short_raises_and_never_turns_gray(format: str, part: float) -> None:
    whole = encoded(Image.fromarray(PHOTO), format)
    with pytest.raises(UnreadablePhoto) as reason:
        decode_photo(whole[: int(len(whole) * part)])
    assert str(reason.value)
    assert "\n" not in str(reason.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>404 Not Found</html>", "not an image format"),
        (bytes(1000), "not an image format"),
        (b"\xff\xd8\xff", "."),
    ],
)
def test_what_is_no_photo_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadablePhoto, match=reason):
        decode_photo(data)


def huge_png(width: int, height: int) -> bytes:
    """A PNG that only claims its size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(name + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + name + data + crc

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    header = chunk(b"IHDR", size + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_photos_beyond_the_pixel_limit_are_refused_before_they_take_memory() -> None:
    with pytest.raises(UnreadablePhoto, match="the limit is 256,000,000"):
        load_photo(huge_png(20_000, 15_000))
    with pytest.raises(UnreadablePhoto, match="exceeds limit"):
        load_photo(huge_png(60_000, 60_000))


def test_a_twenty_megapixel_photo_is_no_bomb() -> None:
    assert MAX_PIXELS > 5000 * 4000 * 10
    assert load_photo(encoded(Image.new("L", (5000, 4000)), "PNG")).size == (5000, 4000)
