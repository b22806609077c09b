"""The compiled loop over photos of a .beton file: read, decode, cut. It runs without the GIL.

Several threads run it on the same batch; an atomic counter deals out the photos, so none of them
goes through Python between two photos.
"""

from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ibeton.pipeline.compiled import compiled
from ibeton.pipeline.crops.cpu import cut_views
from ibeton.pipeline.sampling.draws import DRAW, draw_sample
from ibeton.pipeline.store.beton import JPG
from ibeton.pipeline.store.jpeg import MAX_PIXELS
from ibeton.pipeline.store.turbojpeg import FLAGS, RGB, library

STAGES = ("read", "decode", "crop")
_MONOTONIC = 1  # time.h: CLOCK_MONOTONIC
_MOST = 3 * MAX_PIXELS  # bytes of a decoded photo
_FLAGS, _RGB = np.int32(FLAGS), np.int32(RGB)

# Functions of C by name: unlike an address, a name may be cached on disk with the compiled loop.
_address, _i32, _i64 = types.intp, types.int32, types.int64
for _name in ("tjDecompressHeader3", "tjDecompress2"):
    _place = np.frombuffer(getattr(library(), _name), np.uintp)[0]
    llvmlite.binding.add_symbol(_name, int(_place))
_tj_header = types.ExternalFunction(
    "tjDecompressHeader3", _i32(_address, _address, types.uint64, *[_address] * 4)
)
_tj_decode = types.ExternalFunction(
    "tjDecompress2",
    _i32(_address, _address, types.uint64, _address, _i32, _i32, _i32, _i32, _i32),
)
_pread = types.ExternalFunction("pread", _i64(_i32, _address, types.uint64, _i64))
_clock = types.ExternalFunction("clock_gettime", _i32(_i32, _address))


class Stored(NamedTuple):
    """Where the photos of .beton files are: arrays of a BetonReader, which must outlive their use,
    over all samples."""

    files: np.ndarray  # int32 [n], descriptors
    pointers: np.ndarray  # uint64 [n]
    sizes: np.ndarray  # uint64 [n], bytes
    heights: np.ndarray  # uint16 [n]
    widths: np.ndarray  # uint16 [n]
    modes: np.ndarray  # uint8 [n]


class Task(NamedTuple):
    """One batch of B photos. With global crops of V > 0 views the views are cut, else the photos
    are left in `pixels`."""

    epoch: int
    indices: np.ndarray  # int64 [B], samples
    next: np.ndarray  # int64 [1], the next photo to take
    pixels: np.ndarray  # uint8 [bytes]
    offsets: np.ndarray  # int64 [B], where each photo begins in `pixels`
    global_crops: np.ndarray  # uint8 [B, V, 3, S, S]
    local_crops: np.ndarray  # uint8 [B, L, 3, s, s]
    times: np.ndarray  # int64 [B, 1 + STAGES, 2], seconds and nanoseconds around each stage


@intrinsic
def _take_one(typing: Any, counter: Any) -> Any:
    """Add 1 to the int64 at address `counter`, atomically; gives what it was."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        place = builder.inttoptr(arguments[0], word.as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(word, 1), "seq_cst")

    return types.int64(types.intp), emit


@compiled
def _decode(decoder: int, data: np.ndarray, height: int, width: int, photo: np.ndarray) -> bool:
    """JPEG bytes to `photo` uint8 [height * width * 3]. False for a JPEG of another size (which the
    library would scale) and for any warning."""
    found = np.zeros(4, np.int32)
    at, size = found.ctypes.data, np.uint64(data.size)
    source = data.ctypes.data
    if _tj_header(decoder, source, size, at, at + 4, at + 8, at + 12) != 0:
        return False
    if found[0] != width or found[1] != height:
        return False
    rows, columns = np.int32(height), np.int32(width)
    to = photo.ctypes.data
    zero = np.int32(0)
    return _tj_decode(decoder, source, size, to, columns, zero, rows, _RGB, _FLAGS) == 0


@compiled
def work_on(
    task: Task, photos: Stored, decoder: int, specs: np.ndarray, seed: int
) -> tuple[int, int]:
    """Take photos of `task` until none is left, or one does not decode.

    `decoder` is a handle of libjpeg-turbo's, `specs` SPEC [V + L]. Returns how many photos were
    finished, and the place in the batch of the one that failed, which is not counted, or -1.
    """
    finished = 0
    counter, clock = task.next.ctypes.data, np.int32(_MONOTONIC)
    cut = task.global_crops.shape[1] > 0
    while True:
        i = _take_one(counter)
        if i >= len(task.indices):
            return finished, -1
        index, times = task.indices[i], task.times[i]
        height, width = np.int64(photos.heights[index]), np.int64(photos.widths[index])
        size, length = photos.sizes[index], 3 * height * width
        _clock(clock, times[0].ctypes.data)
        data = np.empty(size, np.uint8)
        begin = np.int64(photos.pointers[index])
        got = _pread(photos.files[index], data.ctypes.data, np.uint64(size), begin)
        _clock(clock, times[1].ctypes.data)
        start = task.offsets[i]
        good = got == np.int64(size) and length <= _MOST
        if good and cut:
            photo = np.empty(length, np.uint8)
        else:
            photo = task.pixels[start : start + length]
        if good and photos.modes[index] == JPG:
            good = _decode(decoder, data, height, width, photo)
        elif good:
            good = data.size == length
            if good:
                photo[:] = data
        _clock(clock, times[2].ctypes.data)
        if good and cut:
            draws = np.empty(len(specs), DRAW)
            draw_sample(specs, seed, task.epoch, index, height, width, draws)
            pixels = photo.reshape((height, width, 3))
            cut_views(pixels, draws, task.global_crops[i], task.local_crops[i])
        _clock(clock, times[3].ctypes.data)
        if not good:
            return finished, i
        finished += 1
