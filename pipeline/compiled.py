"""The one way in which this package compiles with numba."""

from numba import njit

# A function that leaves fastmath and error_model open takes them from whoever has it compiled
# first, and the cache on disk keeps the result. FFCV compiles with fastmath: without these two
# words, crops would change in their last bit with the order of imports.
compiled = njit(cache=True, nogil=True, fastmath=False, error_model="python")
