"""Transposition of bytes, whole and in part."""

import numpy as np
import pytest

from ibeton.pipeline.crops.transpose import transpose

SIDES = [1, 2, 15, 16, 17, 31, 32, 33, 50, 96]


@pytest.mark.parametrize("rows", SIDES)
@pytest.mark.parametrize("cols", SIDES)
def test_every_byte_changes_place_and_nothing_else_is_written(rows: int, cols: int) -> None:
    rng = np.random.default_rng(rows * 1000 + cols)
    source = rng.integers(0, 256, (rows, cols), np.uint8)
    target = np.full((cols + 2, rows + 3), 77, np.uint8)
    transpose(source, 0, 1, 0, rows, cols, target)
    np.testing.assert_array_equal(target[:cols, :rows], source.T)
    assert (target[cols:] == 77).all()
    assert (target[:, rows:] == 77).all()


def test_a_part_is_taken_by_first_row_step_and_first_column() -> None:
    source = np.arange(200 * 64, dtype=np.uint32).astype(np.uint8).reshape(200, 64)
    target = np.zeros((40, 64), np.uint8)
    transpose(source, 7, 3, 5, 60, 40, target)
    np.testing.assert_array_equal(target[:, :60], source[7 : 7 + 180 : 3, 5:45].T)


def test_rows_may_stand_in_a_wider_array() -> None:
    wide = np.random.default_rng(0).integers(0, 256, (20, 3, 32), np.uint8)
    target = np.zeros((32, 3, 20), np.uint8)
    for c in range(3):
        transpose(wide[:, c], 0, 1, 0, 20, 32, target[:, c])
    np.testing.assert_array_equal(target, wide.transpose(2, 1, 0))
