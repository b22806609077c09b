"""How near to the installed Pillow's crops ours must be."""

import numpy as np
import PIL

# Pillow 13 is what our crops repeat. Earlier ones, all that Python 3.10 can have, make the two
# passes of some resizes in the other order and round differently on the way.
SAME_ARITHMETIC = int(PIL.__version__.split(".")[0]) >= 13


def assert_pillows(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal bytes; with an older Pillow a mean difference of 0.5 and 8 at the 99.9th percentile."""
    if SAME_ARITHMETIC:
        np.testing.assert_array_equal(ours, theirs)
        return
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.mean() < 0.5
    assert np.percentile(difference, 99.9) <= 8
