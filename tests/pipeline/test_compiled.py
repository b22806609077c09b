"""Compiled code must not depend on who has it compiled first."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# FFCV compiles with fastmath; what it calls must not inherit that, least of all into the cache.
PROGRAM = """
import numpy as np
from numba import njit
from pipeline import crops

@njit(fastmath=True)
def careless(image, factor):
    crops.adjust_hue(image, factor)

careless(np.zeros((2, 2, 3), np.uint8), 0.1)
red = np.array([[[15, 12, 0]]], np.uint8)  # hue 34 in Pillow, 33 with fastmath
assert crops._to_hue_saturation(15, 12, 0) == (34, 255)
image = np.tile(red, (4, 4, 1))
careless(image, 0.1)
plain = np.tile(red, (4, 4, 1))
crops.adjust_hue.py_func(plain, 0.1)
assert (image == plain).all(), (image[0, 0], plain[0, 0])
"""


def test_a_careless_caller_does_not_change_the_arithmetic(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
