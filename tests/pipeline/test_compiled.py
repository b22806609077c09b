"""Compiled code must not depend on who has it compiled first."""

import os
import subprocess
import sys
from pathlib import Path

from paths import ROOT

# FFCV compiles with fastmath; what it calls must not inherit that, least of all into the cache.
PROGRAM = """
import numpy as np
from numba import njit
from ibeton.pipeline.crops import color

@njit(fastmath=True)
def careless(view, factor):
    color.adjust_hue(view, factor)

view = np.random.default_rng(0).integers(0, 256, (3, 1 << 20), dtype=np.uint8)
plain = view.copy()
careless(view, 0.1)  # has it compiled first
color.adjust_hue.py_func(small := plain[:, :2000].copy(), 0.1)
assert (view[:, :2000] == small).all()
from PIL import Image
from torchvision.transforms.functional import adjust_hue
picture = Image.fromarray(np.ascontiguousarray(plain.T.reshape(1024, 1024, 3)))
assert (np.asarray(adjust_hue(picture, 0.1)).reshape(-1, 3).T == view).all()
"""


def test_a_careless_caller_does_not_change_the_arithmetic(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


CALLER = """
import numpy as np
from pipeline.callee import value
from pipeline.compiled import compiled

@compiled
def answer():
    return value() + 0

print(answer())
"""


def test_the_cache_forgets_a_caller_when_what_it_calls_changes(tmp_path: Path) -> None:
    package = tmp_path / "pipeline"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "compiled.py").write_text((ROOT / "pipeline" / "compiled.py").read_text())
    (package / "caller.py").write_text(CALLER)
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # which tells sources apart by whole seconds
    for value in (1, 2):
        (package / "callee.py").write_text(
            "from pipeline.compiled import compiled\nfrom pipeline.constants import VALUE\n"
            "@compiled\ndef value():\n    return VALUE\n"
        )
        (package / "constants.py").write_text(f"VALUE = {value}\n")
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.caller"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == f"{value}\n", done.stderr
