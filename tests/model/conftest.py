"""What the model tests share: the published numbers, and what "equal" means."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from paths import REFERENCE
from torch import Tensor

from ibeton.benchmarks.harness.interpreter import adapt_interpreter
from ibeton.model.kernels.launch import interpreted

Arrays = dict[str, Any]

if interpreted():  # by test_interpreted.py
    adapt_interpreter()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tensors are small here


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Arrays]:
    """name -> all arrays of tests/reference/name.npz."""
    loaded: dict[str, Arrays] = {}

    def load(name: str) -> Arrays:
        if name not in loaded:
            with np.load(REFERENCE / f"{name}.npz") as arrays:
                loaded[name] = {key: arrays[key] for key in arrays.files}
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def under() -> Callable[[Arrays, str], dict[str, Tensor]]:
    """(arrays, prefix) -> the tensors whose names start with the prefix, by the rest."""

    def select(arrays: Arrays, prefix: str) -> dict[str, Tensor]:
        return {
            key[len(prefix) :]: torch.from_numpy(np.array(value))
            for key, value in arrays.items()
            if key.startswith(prefix)
        }

    return select


@pytest.fixture(scope="session")
def assert_near() -> Callable[..., None]:
    """Fail unless the largest difference is within `tolerance` of the largest expected value."""

    def check(actual: Any, expected: Any, tolerance: float = 1e-5, what: str = "") -> None:
        actual = actual.detach() if isinstance(actual, Tensor) else actual
        actual = np.asarray(actual, dtype=np.float64)
        expected = np.asarray(expected, dtype=np.float64)
        assert actual.shape == expected.shape, what
        largest = np.abs(expected).max()
        error = np.abs(actual - expected).max()
        assert error <= tolerance * largest, f"{what}: off by {error:.3g} of {largest:.3g}"

    return check
