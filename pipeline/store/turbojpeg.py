"""libjpeg-turbo, called directly, with the accurate DCT: its pixels are Pillow's.

FFCV calls it with the fast DCT, whose pixels differ from Pillow's by about 1 of 255. The accurate
DCT is as fast on processors with AVX2 (`benchmarks/pipeline.py`).
"""

import ctypes
import functools
import threading

import numpy as np

from ibeton.pipeline.store.decode import UnreadablePhoto

_NAMES = ("libturbojpeg.so.0", "libturbojpeg.so", "libturbojpeg.dylib", "turbojpeg.dll")
RGB = 0  # turbojpeg.h: TJPF_RGB
# turbojpeg.h: TJFLAG_ACCURATEDCT, and TJFLAG_LIMITSCANS against photos of thousands of scans.
FLAGS = 4096 | 32768
CMYK, _FIRST_CMYK = 11, 3  # TJPF_CMYK; TJCS_CMYK, which TJCS_YCCK follows
_STOP_ON_WARNING = 8192  # TJFLAG_STOPONWARNING
_SMALL = 8  # the strongest reduction: the mean of each block
_EARLY = b"premature end of data segment"
_pointer, _int, _size = ctypes.c_void_p, ctypes.c_int, ctypes.c_ulong


@functools.cache
def library() -> ctypes.CDLL:
    """The TurboJPEG library of this machine. Raises OSError if there is none."""
    for name in _NAMES:
        try:
            found = ctypes.CDLL(name)
        except OSError:
            continue
        found.tjInitDecompress.restype = _pointer
        found.tjDestroy.argtypes = [_pointer]
        found.tjDecompressHeader3.argtypes = [_pointer, _pointer, _size, *[_pointer] * 4]
        found.tjDecompress2.argtypes = [_pointer, _pointer, _size, _pointer, *[_int] * 5]
        found.tjGetErrorStr2.argtypes, found.tjGetErrorStr2.restype = [_pointer], ctypes.c_char_p
        return found
    raise OSError("libturbojpeg is not installed")


_of_thread = threading.local()


def ends_early(jpeg: bytes | memoryview) -> bool:
    """Whether the compressed data of a JPEG end before its image does, as in a truncated file with
    an end marker: a decoder would fill the rest with gray. Takes two thirds of a decode's time.
    False if the library is missing, and for anything but a JPEG."""
    try:
        return thread_decoder().ends_early(jpeg)
    except OSError:
        return False


def thread_decoder() -> "Decoder":
    """The decompressor of this thread. Raises OSError if the library is missing."""
    if not hasattr(_of_thread, "decoder"):
        _of_thread.decoder = Decoder()
    decoder: Decoder = _of_thread.decoder
    return decoder


class Decoder:
    """A decompressor, for one thread at a time. Raises OSError if the library is missing."""

    handle: int = 0

    def __init__(self) -> None:
        self._library = library()
        self.handle = self._library.tjInitDecompress()
        if not self.handle:
            raise MemoryError("libjpeg-turbo could not make a decompressor")

    def decode(self, jpeg: bytes | memoryview, height: int, width: int) -> np.ndarray:
        """uint8 [height, width, 3] of a gray or color JPEG of that size.

        The plain counterpart of `loaders/decode_loop.py`. Raises UnreadablePhoto for another size
        and for any warning of the library.
        """
        data = np.frombuffer(jpeg, np.uint8)
        header = self._header(data)
        if header is not None and (header[1], header[0]) != (height, width):
            raise UnreadablePhoto(f"is {header[0]} x {header[1]} pixels, not {width} x {height}")
        pixels = np.empty((height, width, 3), np.uint8)
        if header is None or not self._decompress(data, pixels, RGB, FLAGS):
            raise UnreadablePhoto(self._library.tjGetErrorStr2(self.handle).decode())
        return pixels

    def ends_early(self, jpeg: bytes | memoryview) -> bool:
        """See the function of that name."""
        data = np.frombuffer(jpeg, np.uint8)
        if (header := self._header(data)) is None:
            return False
        width, height = (-(-int(side) // _SMALL) for side in header[:2])
        pixels = np.empty((height, width, 4), np.uint8)
        # Four values per pixel: CMYK and the like have another layout, and the same beginning.
        form = CMYK if header[3] >= _FIRST_CMYK else RGB
        whole = self._decompress(data, pixels, form, FLAGS | _STOP_ON_WARNING)
        return not whole and _EARLY in self._library.tjGetErrorStr2(self.handle)

    def _header(self, data: np.ndarray) -> np.ndarray | None:
        """Width, height, subsampling and color space, int32 [4]; None if there is no header."""
        found = np.zeros(4, np.int32)
        places = [found.ctypes.data + 4 * i for i in range(4)]
        failed = self._library.tjDecompressHeader3(
            self.handle, data.ctypes.data, data.size, *places
        )
        return None if failed else found

    def _decompress(self, data: np.ndarray, pixels: np.ndarray, form: int, flags: int) -> bool:
        """Decode into `pixels`; False if the library warns or fails."""
        height, width = pixels.shape[:2]
        sizes = (pixels.ctypes.data, width, 0, height, form, flags)
        return not self._library.tjDecompress2(self.handle, data.ctypes.data, data.size, *sizes)

    def close(self) -> None:
        """Free the decompressor."""
        if self.handle:
            self._library.tjDestroy(self.handle)
            self.handle = 0

    __del__ = close
