"""How the C library treats the memory that batches come and go in."""

import ctypes

# Names and values of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = (1 << 31) - 1
_MMAP_FROM = 1 << 30  # bytes


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, for the whole process; other C libraries are left as they are.

    By default it hands each freed batch and decoded photo back to the kernel, which clears every
    page before it gives it out again: 230 page faults a photo, a tenth of the loader's time.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None:
        tune(_M_MMAP_THRESHOLD, _MMAP_FROM)
        tune(_M_TRIM_THRESHOLD, _NEVER)
