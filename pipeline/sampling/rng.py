"""Counter-based random numbers: any draw of any sample, independent of all other draws.

A key is a hash of (seed, epoch, sample index, purpose). Draw number `counter` of a key is a hash of
key + counter x golden ratio: SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014), started at the key and read at any position. There is no state, so
worker count, batch size, rank and device do not change what a sample draws.

All arithmetic is on uint64, which wraps. numba turns a mix of int64 and uint64 into float64, hence
np.uint64 around every operand. From Python, wrap a key in np.uint64 before passing it back, as
numba takes an int for an int64.
"""

from typing import Any

import numpy as np

from ibeton.pipeline.compiled import compiled

Uint64 = Any  # numba's uint64, of which mypy knows nothing

MOST_VIEWS = 0x100  # of a sample
# Purposes. The number of the view is added to AUGMENT and MASK.
AUGMENT = 0x100  # crop box, flip, colors, blur, solarize of one view
MASK = 0x200  # the mask of one view

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, made odd
FACTOR_1 = np.uint64(0xBF58476D1CE4E5B9)  # SplitMix64's two factors and three shifts
FACTOR_2 = np.uint64(0x94D049BB133111EB)
SHIFT_1, SHIFT_2, SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
SHIFT_53 = np.uint64(11)  # keeps the upper 53 bits: a float64's worth
ONE = np.uint64(1)
STEP_53 = 2.0**-53


@compiled
def mix(z: Uint64) -> Uint64:
    """Return the SplitMix64 hash, a bijection, of one uint64."""
    z = np.uint64(z)
    z = (z ^ (z >> SHIFT_1)) * FACTOR_1
    z = (z ^ (z >> SHIFT_2)) * FACTOR_2
    return z ^ (z >> SHIFT_3)


@compiled
def sample_key(seed: int, epoch: int, index: int, purpose: int) -> Uint64:
    """Return the uint64 key of one sample's draws for one purpose; the four are any int64."""
    key = mix(np.uint64(seed) + GOLDEN)
    key = mix((key ^ np.uint64(epoch)) + GOLDEN)
    key = mix((key ^ np.uint64(index)) + GOLDEN)
    return mix((key ^ np.uint64(purpose)) + GOLDEN)


@compiled
def uniform(key: Uint64, counter: int) -> float:
    """Return draw number `counter` of `key`: a float64 in [0, 1), a multiple of 2**-53."""
    bits = mix(np.uint64(key) + (np.uint64(counter) + ONE) * GOLDEN)
    return float(bits >> SHIFT_53) * STEP_53


@compiled
def randint(key: Uint64, counter: int, n: int) -> int:
    """Return draw number `counter` of `key` as an int64 in 0 .. n - 1; n is 1 .. 2**53.

    Results differ in probability by at most n x 2**-53. The product never rounds up to n: the
    largest uniform is 1 - 2**-53.
    """
    return int(uniform(key, counter) * n)


MASK_64 = (1 << 64) - 1


def mix_reference(z: int) -> int:
    """`mix` in Python's integers, wrapped to 64 bits by hand."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK_64
    return z ^ (z >> 31)


def sample_key_reference(seed: int, epoch: int, index: int, purpose: int) -> int:
    """`sample_key` in Python's integers."""
    key = 0
    for part in (seed, epoch, index, purpose):
        key = mix_reference(((key ^ (part & MASK_64)) + 0x9E3779B97F4A7C15) & MASK_64)
    return key


def uniform_reference(key: int, counter: int) -> float:
    """`uniform` in Python's integers."""
    bits = mix_reference((key + (counter + 1) * 0x9E3779B97F4A7C15) & MASK_64)
    return (bits >> 11) * 2.0**-53


def randint_reference(key: int, counter: int, n: int) -> int:
    """`randint` in Python's integers."""
    return int(uniform_reference(key, counter) * n)
