"""How this package compiles with numba."""

import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numba
from numba import njit


def _cache_of_this_source() -> str:
    """A cache folder for the current sources of this folder.

    numba checks whether the file of a function has changed, not the files of the functions and
    constants that it uses, and would keep running their old code.
    """
    folder = Path(__file__).parent
    sources = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        sources.update(path.read_bytes())
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ibeton"
    for root in (Path(chosen) if chosen else folder / "__pycache__", home):
        cache = root / f"compiled-{sources.hexdigest()[:12]}"
        if _is_writable(cache):
            return str(cache)
    temporary = tempfile.mkdtemp(prefix="ibeton-compiled-")
    os.environ["NUMBA_CACHE_DIR"] = temporary  # worker processes use the same
    print(
        f"compiling to {temporary}, as neither {chosen or folder} nor {home} can be written; to"
        " keep what is compiled, set NUMBA_CACHE_DIR to a folder that can be written",
        file=sys.stderr,
    )
    return temporary


def _is_writable(folder: Path) -> bool:
    """Whether files can be created in `folder`, which is created if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


numba.config.CACHE_DIR = _cache_of_this_source()

# Without fastmath and error_model, a function inherits them from its first caller, and the cache on
# disk keeps the result. FFCV compiles with fastmath, so crops would depend on the order of imports.
# With numpy's error model division raises no exception, which would prevent vector code.
SETTINGS: dict[str, Any] = {"cache": True, "fastmath": False, "error_model": "numpy"}
compiled = njit(nogil=True, **SETTINGS)

# For functions called per pixel: only plain arithmetic lets the caller's loop become vector code.
inlined = njit(inline="always", nogil=True, fastmath=False, error_model="numpy")
