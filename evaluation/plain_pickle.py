"""Reads pickles of published data sets without running what they hold."""

import pickle
from pathlib import Path
from typing import Any

# What NumPy's own pickles name, under the old and the new name of its core.
_ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
_ALLOWED |= {
    (f"numpy.{core}.multiarray", name)
    for core in ("core", "_core")
    for name in ("_reconstruct", "scalar")
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which may run code")
        return super().find_class(module, name)


def read_pickle(path: Path, what: str) -> Any:
    """Lists, dicts, numbers, text and NumPy arrays of a pickle. Raises FileNotFoundError, or
    ValueError, which says that the file is no `what`, for anything else."""
    with open(path, "rb") as file:
        try:
            return _Unpickler(file, encoding="latin1").load()
        except Exception as error:  # what damage leads to has no bounds
            raise ValueError(f"{path} is not a valid {what} ({error})") from error
