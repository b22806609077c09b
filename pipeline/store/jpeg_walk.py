"""Is a JPEG whole, and one to be stored as it is? Told from its structure, without decoding it.

A decoder stops at three kinds of fault only: a file that ends too early, a marker segment that
makes no sense, and a table or component that a scan needs and nothing defined. All three stand in
the markers, which this walk reads from the first to the end of the image; between them it looks
for nothing but the next marker. It takes a twentieth of a decode's time and misses what decoders
pass over in silence as well: other pixels in data that is well-formed.

The walk is for the usual photo. Whatever it does not expect it leaves to a full decode.
"""

import re
import struct
from collections.abc import Iterator
from functools import lru_cache

from ibeton.pipeline.store.decode import MAX_PIXELS

_MAX_SIDE = 65500  # libjpeg's
_AFTER_DATA = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # no stuffed byte, no restart marker
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, all with Huffman codes
_DHT, _EOI, _SOS, _DQT, _DRI, _COM = 0xC4, 0xD9, 0xDA, 0xDB, 0xDD, 0xFE


class _Unusual(Exception):
    """Not a JPEG that the walk knows to be whole."""


def whole_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG with three components of 8 bits that decodes to its end, else None:
    it is something else, damaged, or too unusual to tell without a decode."""
    walk = _Walk()
    try:
        for marker, body in _segments(data):
            walk.segment(marker, body)
        return walk.size_at_end()
    except (_Unusual, struct.error, IndexError, KeyError):
        return None


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, content) of each segment up to the end of the image; what follows that end is no
    matter, as decoders do not reach it."""
    if data[:2] != b"\xff\xd8":
        raise _Unusual
    position = 2
    while data[position] == 0xFF:
        marker = data[position + 1]
        if marker == _EOI:
            return
        (length,) = struct.unpack_from(">H", data, position + 2)
        body = data[position + 4 : position + 2 + length]
        if length < 2 or len(body) != length - 2:
            raise _Unusual  # cut short
        yield marker, body
        position += 2 + length
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

    def segment(self, marker: int, body: bytes) -> None:
        if marker == _SOS:
            self._scan(body)
        elif marker == _DHT:
            self._codes.update(_huffman_tables(body))
        elif marker == _DQT:
            self._quantisers.update(_quantisation_tables(body))
        elif marker in _FRAMES:
            self._frame(marker, body)
        elif 0xE0 <= marker <= 0xEF:
            # A second picture behind the first (MPF) and short profiles can trip Pillow's opening.
            if marker == 0xE2 and not (body.startswith(b"ICC_PROFILE\0") and len(body) > 14):
                raise _Unusual
        elif marker == _DRI:
            if len(body) != 2:
                raise _Unusual
        elif marker != _COM:
            raise _Unusual

    def size_at_end(self) -> tuple[int, int]:
        if not self._components or self._seen != set(self._components):
            raise _Unusual
        return self._size

    def _frame(self, marker: int, body: bytes) -> None:
        precision, height, width, count = struct.unpack_from(">BHHB", body)
        if self._components or precision != 8 or count != 3 or len(body) != 6 + 3 * count:
            raise _Unusual
        if not 0 < width <= _MAX_SIDE or not 0 < height <= _MAX_SIDE or width * height > MAX_PIXELS:
            raise _Unusual
        parts = [body[i : i + 3] for i in range(6, 15, 3)]
        factors = [(part[1] >> 4, part[1] & 15) for part in parts]
        for axis in (0, 1):
            sides = [factor[axis] for factor in factors]
            if not all(1 <= side <= 4 and max(sides) % side == 0 for side in sides):
                raise _Unusual
        if sum(across * down for across, down in factors) > 10:  # blocks that are coded together
            raise _Unusual
        self._components = {part[0]: part[2] for part in parts}
        if len(self._components) != 3:
            raise _Unusual
        self._size, self._progressive = (width, height), marker == 0xC2

    def _scan(self, body: bytes) -> None:
        count = body[0]
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
