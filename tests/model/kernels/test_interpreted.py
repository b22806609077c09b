"""The Triton kernels in Triton's interpreter, which is chosen when Triton is imported: hence a
process of its own, with the tests that hold for every path."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(0)  # minutes alone, hours beside other work
KERNELS = [f"tests/model/kernels/test_{name}.py" for name in ("fused", "update", "check")]
BLOCK = "tests/model/backbones/test_vit.py"
STEP = "tests/model/test_reference.py"
PATHS = [  # the published backbone; the step against the reference
    f"{BLOCK}::test_gradients_through_masked_forward[packed-96]",
    f"{STEP}::test_every_setting[dtype0-not_recomputed]",
    f"{STEP}::test_half_precision[plain-dtype1]",
]
LONG = {  # minutes each
    "kernels": ["-m", "slow or not slow", *KERNELS],
    "backbone": [BLOCK],
    "head": ["tests/model/test_head.py"],
    "loss": ["tests/model/test_loss.py"],
    "settings": [f"{STEP}::test_{name}" for name in ("every_setting", "every_batch")],
    "half precision": [f"{STEP}::test_half_precision"],
    "published steps": [  # without the plain paths
        *("tests/model/test_trajectory.py", "-k", "(fast or not_recomputed) and not float64"),
    ],
}


def in_interpreter(*tests):
    """Run these tests in the interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "timeout=0", "-p", "no:cacheprovider", *tests],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def test_kernels_equal_their_references_and_the_step_holds():
    in_interpreter(*KERNELS, *PATHS)


@pytest.mark.slow
@pytest.mark.parametrize("tests", LONG.values(), ids=LONG)
def test_every_fixture_and_setting_holds(tests):
    in_interpreter(*tests)
