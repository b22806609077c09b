"""Bytes of a photo -> RGB pixels, strictly: an incomplete photo is an error, never partly gray.

Decoding follows the published recipe, Pillow's `convert("RGB")`: alpha is dropped, EXIF orientation
and color profiles are ignored. The exception is 16-bit gray, which Pillow would clip to white.
"""

import io

import numpy as np
from PIL import Image

from ibeton.pipeline.store.jpeg import MAX_PIXELS, MAX_SCANS, count_scans

# Pillow refuses above twice this and would warn from 89 megapixels on.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

_GRAY16 = ("I", "I;16", "I;16L", "I;16B", "I;16N")


class UnreadablePhoto(ValueError):
    """A photo that cannot be decoded; its message is the reason."""


class UnreadableData(OSError):
    """So many photos are unreadable that the whole data set must be wrong."""


def load_photo(data: bytes | memoryview) -> Image.Image:
    """Decode `data` (any format that Pillow knows, by content) in the photo's own mode.

    Raises UnreadablePhoto if it is not a photo, is truncated, or has more than MAX_PIXELS pixels or
    MAX_SCANS scans.
    """
    if not len(data):
        raise UnreadablePhoto("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UnreadablePhoto(f"{width} x {height} pixels, the limit is {MAX_PIXELS:,}")
        if image.info.get("progressive") and (scans := count_scans(data)) > MAX_SCANS:
            raise UnreadablePhoto(f"a JPEG of {scans:,} scans, the limit is {MAX_SCANS}")
        image.load()
        if image.format in ("JPEG", "MPO"):
            check_complete(data)
    except (UnreadablePhoto, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise UnreadablePhoto("not an image format that Pillow knows") from None
    except Exception as error:  # on damaged files Pillow's plugins raise nearly anything
        raise UnreadablePhoto(str(error) or type(error).__name__) from error
    return image


def check_complete(data: bytes | memoryview) -> None:
    """Raise UnreadablePhoto for a JPEG whose compressed data end before its image does, which
    decoders ignore."""
    from ibeton.pipeline.store.turbojpeg import ends_early  # it imports this module

    if ends_early(data):
        raise UnreadablePhoto("its compressed data end early: the rest of it would be gray")


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB, 8 bits a channel; 16-bit gray is scaled by 1/257, rounded.

    Raises UnreadablePhoto for gray beyond 16 bits and for floating-point pixels.
    """
    if image.mode == "RGB":
        return image
    if image.mode in _GRAY16:
        gray = np.asarray(image).astype(np.int64)  # [H, W]
        if gray.min() < 0 or gray.max() > 65535:
            raise UnreadablePhoto(f"gray values {gray.min()}..{gray.max()} do not fit 16 bits")
        return Image.fromarray(((gray + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnreadablePhoto("floating-point pixels, whose range is unknown")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise UnreadablePhoto(f"mode {image.mode} does not convert to RGB: {error}") from error


def decode_photo(data: bytes | memoryview) -> np.ndarray:
    """Decode the bytes of a photo to uint8 [H, W, 3], RGB.

    Raises UnreadablePhoto with the reason.
    """
    return np.array(to_rgb(load_photo(data)))
