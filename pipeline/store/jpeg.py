"""What the markers of a JPEG tell, without decoding it.

A decoder fails for three reasons only: the file ends too early, a marker segment is malformed, or a
scan needs a table or component that is not defined. The markers show all three. This walk reads
them from the start to the end of the image in a twentieth of a decode's time. It does not see
compressed data that are well-formed but too short or wrong: `decode.py` does.

The walk knows usual photos. Anything unexpected is left to a full decode.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

MAX_PIXELS = 256_000_000  # 768 MB of RGB; photos of 20 or 100 megapixels are far below
MAX_SCANS = 100  # usual encoders write 10, and decoders take as long for each as for a photo
_MAX_SIDE = 65500  # libjpeg's
_AFTER_DATA = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # no stuffed byte, no restart marker
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, all with Huffman codes
_DHT, _EOI, _SOS, _DQT, _DRI, _ADOBE, _COM = 0xC4, 0xD9, 0xDA, 0xDB, 0xDD, 0xEE, 0xFE


class _Unusual(Exception):
    """Not a JPEG that the walk knows to be complete."""


def _need(good: object) -> None:
    if not good:
        raise _Unusual


@dataclass(frozen=True)
class Jpeg:
    """A complete 8-bit JPEG, gray or of three components."""

    width: int
    height: int
    is_rgb: bool  # instead of YCbCr, by Adobe's marker or the names of its components
    simple: bool  # Pillow opens it without trouble
    end: int  # bytes up to the end of the image; the rest is not decoded


def read_jpeg(data: bytes | memoryview) -> Jpeg | None:
    """What the markers of `data` tell. None if it is not a JPEG, is damaged, or too unusual to tell
    without a decode."""
    walk = _Walk()
    try:
        for marker, body, position in _segments(data):
            walk.segment(marker, body, position)
        return walk.jpeg()
    except (_Unusual, struct.error, IndexError, KeyError):
        return None


def whole_jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(width, height) of a JPEG that can be stored as it is, or None."""
    jpeg = read_jpeg(data)
    return (jpeg.width, jpeg.height) if jpeg is not None and jpeg.simple else None


def plain_jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(height, width) of a JPEG that every decoder turns into the same RGB: gray or YCbCr, with
    nothing behind its end. None for anything else, which is left to Pillow: a decoder of batches
    would fail with the whole batch, or fill in gray.
    """
    jpeg = read_jpeg(data) if data[-2:] == b"\xff\xd9" else None
    if jpeg is None or jpeg.is_rgb or jpeg.end != len(data):
        return None
    return jpeg.height, jpeg.width


def count_scans(data: bytes | memoryview) -> int:
    """The scans of a JPEG up to its end, or to where it is damaged."""
    scans = 0
    try:
        for marker, _, _ in _segments(data):
            scans += marker == _SOS
    except (_Unusual, struct.error, IndexError):
        pass
    return scans


def _segments(data: bytes | memoryview) -> Iterator[tuple[int, bytes, int]]:
    """(marker, content, bytes so far) of each segment up to and including the end of the image."""
    _need(data[:2] == b"\xff\xd8")
    position = 2
    while data[position] == 0xFF:
        marker = data[position + 1]
        if marker == _EOI:
            yield marker, b"", position + 2
            return
        (length,) = struct.unpack_from(">H", data, position + 2)
        body = bytes(data[position + 4 : position + 2 + length])
        _need(len(body) == length - 2)  # or it is cut short
        position += 2 + length
        yield marker, body, position
        if marker == _SOS:
            if not (found := _AFTER_DATA.search(data, position)):
                raise _Unusual  # cut short
            position = found.start()
    raise _Unusual


class _Walk:
    """What the segments so far have defined."""

    def __init__(self) -> None:
        self._size = (0, 0)
        self._components: dict[int, int] = {}  # id -> quantization table
        self._progressive = False
        self._quantizers: set[int] = set()
        self._codes: set[tuple[int, int]] = set()  # (0 for DC or 1 for AC, table)
        self._seen: set[int] = set()  # components of which a scan brought the DC part
        self._scans = self._end = 0
        self._is_rgb, self._simple = False, True

    def segment(self, marker: int, body: bytes, position: int) -> None:
        if marker == _SOS:
            self._scan(body)
        elif marker == _EOI:
            self._end = position
        elif marker == _DHT:
            self._codes.update(_huffman_tables(body))
        elif marker == _DQT:
            self._quantizers.update(_quantization_tables(body))
        elif marker in _FRAMES:
            self._frame(marker, body)
        elif 0xE0 <= marker <= 0xEF:
            # A second picture behind the first (MPF) and short profiles can trip Pillow's opening.
            if marker == 0xE2 and not (body.startswith(b"ICC_PROFILE\0") and len(body) > 14):
                self._simple = False
            if marker == _ADOBE and body[:5] == b"Adobe" and body[11:12] == b"\0":
                self._is_rgb = True  # the colors are stored as they are
        elif marker == _DRI:
            _need(len(body) == 2)
        else:
            _need(marker == _COM)

    def jpeg(self) -> Jpeg:
        names = set(self._components)
        _need(names and self._seen == names)
        is_rgb = (self._is_rgb and len(names) == 3) or names == set(b"RGB")
        return Jpeg(*self._size, is_rgb, self._simple, self._end)

    def _frame(self, marker: int, body: bytes) -> None:
        precision, height, width, count = struct.unpack_from(">BHHB", body)
        _need(not self._components and precision == 8 and count in (1, 3))
        _need(len(body) == 6 + 3 * count)
        _need(0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE and width * height <= MAX_PIXELS)
        parts = [body[i : i + 3] for i in range(6, len(body), 3)]
        factors = [(part[1] >> 4, part[1] & 15) for part in parts]
        for axis in (0, 1):
            sides = [factor[axis] for factor in factors]
            _need(all(1 <= side <= 4 and max(sides) % side == 0 for side in sides))
        _need(sum(across * down for across, down in factors) <= 10)  # blocks coded together
        self._components = {part[0]: part[2] for part in parts}
        _need(len(self._components) == count)
        self._size, self._progressive = (width, height), marker == 0xC2

    def _scan(self, body: bytes) -> None:
        count = body[0]
        self._scans += 1
        _need(self._scans <= MAX_SCANS)
        _need(1 <= count <= 3 and len(body) == 4 + 2 * count)
        first, last, bits = body[-3:]
        before, now = bits >> 4, bits & 15
        ids = [body[1 + 2 * i] for i in range(count)]
        tables = [(body[2 + 2 * i] >> 4, body[2 + 2 * i] & 15) for i in range(count)]
        _need(len(set(ids)) == count)
        _need(all(self._components[i] in self._quantizers for i in ids))  # KeyError: no such one
        if self._progressive:
            good = first == last == 0 if first == 0 else count == 1 and first <= last <= 63
            good = good and now <= 13 and before in (0, now + 1)
        else:
            good = (first, last, bits) == (0, 63, 0) and self._seen.isdisjoint(ids)
        need = []
        if first == 0 and before == 0:
            need += [(0, dc) for dc, _ in tables]
            self._seen.update(ids)
        if last > 0:
            need += [(1, ac) for _, ac in tables]
        _need(good and self._seen.issuperset(ids) and self._codes.issuperset(need))


@lru_cache(256)  # most photos share a few tables
def _quantization_tables(body: bytes) -> tuple[int, ...]:
    numbers, position = [], 0
    while position < len(body):
        wide, number = body[position] >> 4, body[position] & 15
        position += 1 + 64 * (1 + wide)
        _need(wide <= 1 and number <= 3 and position <= len(body))
        numbers.append(number)
    return tuple(numbers)


@lru_cache(256)
def _huffman_tables(body: bytes) -> tuple[tuple[int, int], ...]:
    tables, position = [], 0
    while position < len(body):
        kind, number = body[position] >> 4, body[position] & 15
        counts = body[position + 1 : position + 17]
        symbols = body[position + 17 : position + 17 + sum(counts)]
        position += 17 + sum(counts)
        _need(kind <= 1 and number <= 3 and len(counts) == 16 and position <= len(body))
        _need(len(symbols) <= 256 and (kind == 1 or max(symbols, default=0) <= 15))
        code = 0  # the first code of each length; all codes of a length must fit its bits
        for length, count in enumerate(counts, 1):
            code += count
            _need(code < 1 << length or (not count and code == 1 << length))  # no code of ones
            code <<= 1
        tables.append((kind, number))
    return tuple(tables)
