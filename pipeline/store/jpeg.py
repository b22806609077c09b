"""A walk over a JPEG's markers: is it one that every decoder turns into the same RGB?

What is not, from CMYK to files cut short, is for Pillow, whose word on colors and on damage is the
published recipe's. A decoder that works on batches would fail with all of one, or fill in gray.
"""

import re

from ibeton.pipeline.store.decode import MAX_PIXELS

_START, _END = b"\xff\xd8", b"\xff\xd9"
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, all Huffman coded
_SCAN, _ADOBE = 0xDA, 0xEE
# What else may stand before, between and behind scans: tables, applications' data, comments.
_SEGMENTS = (_SCAN, 0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)
# Compressed data hold no 0xff but before a 0 and in the markers of restarts.
_BEHIND_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def plain_jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(height, width) of a JPEG that is gray or YCbCr, has 8 bits and ends with its end marker.

    None for everything else, so also for a file that was cut short, and for one whose compressed
    data, once damaged, hold a marker where none belongs.
    """
    if data[:2] != _START or data[-2:] != _END:
        return None
    size, place = None, 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in _FRAMES and size is None:
            size = _frame_size(bytes(data[place + 4 : end]))
        elif marker not in _SEGMENTS or _is_rgb(marker, bytes(data[place + 4 : place + 16])):
            return None
        if marker == _SCAN:
            if size is None:
                return None
            found = _BEHIND_SCAN.search(data, end)
            end = found.start() if found else len(data)
        if end <= place + 3:  # no segment is shorter than its own length
            return None
        place = end
    return size if place == len(data) - 2 and data[place:] == _END else None


def _frame_size(frame: bytes) -> tuple[int, int] | None:
    """(height, width) of a frame header's content: bits, height, width, count, 3 bytes each."""
    if len(frame) < 6 or frame[0] != 8:
        return None
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    names = frame[6::3]
    if len(names) != frame[5] or len(names) not in (1, 3) or names == b"RGB":
        return None
    return (height, width) if 0 < height * width <= MAX_PIXELS else None


def _is_rgb(marker: int, content: bytes) -> bool:
    """Whether Adobe's marker says that the colors are stored as they are."""
    return marker == _ADOBE and content[:5] == b"Adobe" and content[11:12] == b"\0"
