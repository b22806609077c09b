"""Settings of the C library's allocator."""

import ctypes

# Names and values of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, for the whole process; other C libraries are not changed.

    By default it returns each freed batch and photo to the kernel, which clears every page that it
    gives out: hundreds of page faults per photo, a fifth of the loader's time.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None:
        # Not M_MMAP_THRESHOLD, of which glibc before 2.35 takes 32 MiB at most.
        tune(_M_MMAP_MAX, 0)
        tune(_M_TRIM_THRESHOLD, _NEVER)
