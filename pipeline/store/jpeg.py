"""What a JPEG's markers tell, without decoding it.

A decoder stops at three kinds of fault only: a file that ends too early, a marker segment that
makes no sense, and a table or component that a scan needs and nothing defined. All three stand in
the markers, which this walk reads from the first to the end of the image; between them it looks
for nothing but the next marker. It takes a twentieth of a decode's time. It does not see compressed
data that are well-formed and too few or wrong: `decode.py` does.

The walk knows the usual photo. Whatever it does not expect is left to a full decode.
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
    """Not a JPEG that the walk knows to be whole."""


@dataclass(frozen=True)
class Jpeg:
    """A JPEG of 8 bits, gray or of three components, that decodes to its end."""

    width: int
    height: int
    components: int
    is_rgb: bool  # by Adobe's marker or the names of its components, in place of YCbCr
    simple: bool  # nothing in it trips the opening of a file by Pillow
    end: int  # bytes up to the end of the image; what follows is not decoded


def read_jpeg(data: bytes | memoryview) -> Jpeg | None:
    """What the markers of `data` tell. None for what is not a JPEG, is damaged, or too unusual to
    tell without a decode."""
    walk = _Walk()
    try:
        for marker, body, position in _segments(data):
            walk.segment(marker, body, position)
        return walk.jpeg()
    except (_Unusual, struct.error, IndexError, KeyError):
        return None


def whole_jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(width, height) of a JPEG that can be stored as it is, else None."""
    jpeg = read_jpeg(data)
    return (jpeg.width, jpeg.height) if jpeg is not None and jpeg.simple else None


def plain_jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(height, width) of a JPEG that every decoder turns into the same RGB: gray or YCbCr, and
    with nothing behind its end. None for everything else.

    What is not plain is for Pillow, which the published recipe uses. A decoder that works on
    batches would fail with all of one, or fill in gray.
    """
    if data[-2:] != b"\xff\xd9":
        return None
    jpeg = read_jpeg(data)
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
    """(marker, content, bytes so far) of each segment up to the end of the image, the end
    included; what follows that end is no matter, as decoders do not reach it."""
    if data[:2] != b"\xff\xd8":
        raise _Unusual
    position = 2
    while data[position] == 0xFF:
        marker = data[position + 1]
        if marker == _EOI:
            yield marker, b"", position + 2
            return
        (length,) = struct.unpack_from(">H", data, position + 2)
        body = bytes(data[position + 4 : position + 2 + length])
        if length < 2 or len(body) != length - 2:
            raise _Unusual  # cut short
        position += 2 + length
        yield marker, body, position
        if marker == _SOS:
            found = _AFTER_DATA.search(data, position)
            if not found:
                raise _Unusual  # cut short
            position = found.start()
    raise _Unusual


class _Walk:
    """What the segments so far have defined."""

    def __init__(self) -> None:
        self._size = (0, 0)
        self._components: dict[int, int] = {}  # id -> quantisation table
        self._progressive = False
        self._quantisers: set[int] = set()
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
            self._quantisers.update(_quantisation_tables(body))
        elif marker in _FRAMES:
            self._frame(marker, body)
        elif 0xE0 <= marker <= 0xEF:
            # A second picture behind the first (MPF) and short profiles can trip Pillow's opening.
            if marker == 0xE2 and not (body.startswith(b"ICC_PROFILE\0") and len(body) > 14):
                self._simple = False
            if marker == _ADOBE and body[:5] == b"Adobe" and body[11:12] == b"\0":
                self._is_rgb = True  # the colors are stored as they are
        elif marker == _DRI:
            if len(body) != 2:
                raise _Unusual
        elif marker != _COM:
            raise _Unusual

    def jpeg(self) -> Jpeg:
        names = set(self._components)
        if not names or self._seen != names:
            raise _Unusual
        is_rgb = (self._is_rgb and len(names) == 3) or names == set(b"RGB")
        return Jpeg(*self._size, len(names), is_rgb, self._simple, self._end)

    def _frame(self, marker: int, body: bytes) -> None:
        precision, height, width, count = struct.unpack_from(">BHHB", body)
        if self._components or precision != 8 or count not in (1, 3):
            raise _Unusual
        if len(body) != 6 + 3 * count:
            raise _Unusual
        if not 0 < width <= _MAX_SIDE or not 0 < height <= _MAX_SIDE or width * height > MAX_PIXELS:
            raise _Unusual
        parts = [body[i : i + 3] for i in range(6, len(body), 3)]
        factors = [(part[1] >> 4, part[1] & 15) for part in parts]
        for axis in (0, 1):
            sides = [factor[axis] for factor in factors]
            if not all(1 <= side <= 4 and max(sides) % side == 0 for side in sides):
                raise _Unusual
        if sum(across * down for across, down in factors) > 10:  # blocks that are coded together
            raise _Unusual
        self._components = {part[0]: part[2] for part in parts}
        if len(self._components) != count:
            raise _Unusual
        self._size, self._progressive = (width, height), marker == 0xC2

    def _scan(self, body: bytes) -> None:
        count = body[0]
        self._scans += 1
        if self._scans > MAX_SCANS:
            raise _Unusual
        if not 1 <= count <= 3 or len(body) != 4 + 2 * count:
            raise _Unusual
        first, last, bits = body[-3:]
        before, now = bits >> 4, bits & 15
        ids = [body[1 + 2 * i] for i in range(count)]
        tables = [(body[2 + 2 * i] >> 4, body[2 + 2 * i] & 15) for i in range(count)]
        if len(set(ids)) != count or any(self._components[i] not in self._quantisers for i in ids):
            raise _Unusual  # KeyError: a component that the frame does not have
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
        if not good or not self._seen.issuperset(ids) or not self._codes.issuperset(need):
            raise _Unusual


@lru_cache(256)  # most photos share a few tables
def _quantisation_tables(body: bytes) -> tuple[int, ...]:
    numbers, position = [], 0
    while position < len(body):
        wide, number = body[position] >> 4, body[position] & 15
        position += 1 + 64 * (1 + wide)
        if wide > 1 or number > 3 or position > len(body):
            raise _Unusual
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
        if kind > 1 or number > 3 or len(counts) != 16 or position > len(body):
            raise _Unusual
        if len(symbols) > 256 or (kind == 0 and max(symbols, default=0) > 15):
            raise _Unusual
        code = 0  # the first code of each length; all codes of a length must fit its bits
        for length, count in enumerate(counts, 1):
            code += count
            if code > 1 << length or (count and code == 1 << length):
                raise _Unusual  # all ones is no code
            code <<= 1
        tables.append((kind, number))
    return tuple(tables)
