"""How one photo is stored: its own JPEG bytes, a new JPEG, or raw pixels."""

import errno
import io
import struct
import zlib
from dataclasses import dataclass

from PIL import Image

from ibeton.command import Failure
from ibeton.pipeline.convert.plan import ConvertOptions
from ibeton.pipeline.store.beton import JPG, MAX_SIDE, RAW
from ibeton.pipeline.store.decode import UnreadablePhoto, check_complete, load_photo, to_rgb
from ibeton.pipeline.store.jpeg import whole_jpeg_size
from ibeton.pipeline.store.sources import Photo, read_bytes

# No fault of a file, but of this machine or of a server: the conversion ends, and resumes.
_OF_THE_SYSTEM = (
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ESHUTDOWN),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH),
)


@dataclass(slots=True)
class StoredPhoto:
    """A photo as it goes into the file; `how` is kept, encoded or raw."""

    how: str
    width: int
    height: int
    data: bytes

    @property
    def mode(self) -> int:
        return RAW if self.how == "raw" else JPG


def store_photo(data: bytes, options: ConvertOptions) -> StoredPhoto:
    """Choose what is stored of `data`, which is proved whole.

    keep: the bytes themselves for a gray or color JPEG (8 bits) within the largest resolution, so
    that nothing is compressed twice; all else is encoded anew. A usual JPEG is proved by its
    structure, all else by decoding it. jpg: always anew.
    raw: pixels. smart: pixels, and JPEG where they take more than the threshold, as FFCV has it.

    Raises UnreadablePhoto with the reason.
    """
    size = whole_jpeg_size(data) if options.write_mode == "keep" else None
    if size and max(size) <= (options.max_resolution or MAX_SIDE):
        if options.verify:
            check_complete(data)
        return StoredPhoto("kept", *size, data)
    image = load_photo(data)
    small = _within(image, options.max_resolution)
    if options.write_mode == "keep" and small is image and _is_gray_or_color_jpeg(image):
        return StoredPhoto("kept", *image.size, data)
    rgb = to_rgb(small)
    width, height = rgb.size
    if max(width, height) > MAX_SIDE:
        raise UnreadablePhoto(
            f"{width} x {height} pixels; a side has at most {MAX_SIDE} (see --max-resolution)"
        )
    raw_fits = width * height * 3 <= options.smart_threshold
    if options.write_mode == "raw" or (options.write_mode == "smart" and raw_fits):
        return StoredPhoto("raw", width, height, rgb.tobytes())
    return StoredPhoto("encoded", width, height, _as_jpeg(rgb, options.quality))


class Unopened(str):
    """Why the file of a photo could not be read."""


def store_photos(job: tuple[list[Photo], ConvertOptions]) -> list[StoredPhoto | str]:
    """Read and store some photos, in a worker process; a string is why one is unreadable. Raises
    OSError for what is no fault of one photo: a tar that cannot be read, too many open files, a
    server that does not answer."""
    photos, options = job
    results: list[StoredPhoto | str] = []
    for photo in photos:
        try:
            results.append(store_photo(read_bytes(photo), options))
        except UnreadablePhoto as error:
            results.append(str(error))
        except OSError as error:
            if photo.size is not None or error.errno in _OF_THE_SYSTEM:
                raise
            results.append(Unopened(error.strerror or error))
        except MemoryError:
            raise Failure(f"too little memory for {photo.name}: use fewer --workers") from None
    return results


def checksum(
    crc: int, label: int, mode: int, width: int, height: int, data: bytes | memoryview
) -> int:
    """CRC-32 of a sample as stored, going on from `crc`."""
    return zlib.crc32(data, zlib.crc32(struct.pack("<qBHH", label, mode, width, height), crc))


def _within(image: Image.Image, longest: int) -> Image.Image:
    """`image`, made smaller where its longer side exceeds `longest`.

    Pillow's HAMMING filter: of Pillow's, the nearest to the INTER_AREA of FFCV's writer (at 500 to
    256 pixels mean distance 0.2 to 1.8 of 255, BOX 0.7 to 6.4).
    """
    if not longest or max(image.size) <= longest:
        return image
    scale = longest / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return to_rgb(image).resize((width, height), Image.Resampling.HAMMING)


def _is_gray_or_color_jpeg(image: Image.Image) -> bool:
    # MPO is a JPEG with further pictures after its end, which decoders do not reach.
    return image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")


def _as_jpeg(rgb: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    try:
        rgb.save(file, "JPEG", quality=quality, comment="")  # not the comment of the old file
    except (OSError, ValueError) as error:
        raise UnreadablePhoto(f"cannot be written as JPEG: {error}") from error
    return file.getvalue()
