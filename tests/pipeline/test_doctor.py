"""The doctor says what is there, what is not, and the command that mends it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def report(*, without: str = "") -> tuple[int, str]:
    """Run the doctor in a new process, in which the module `without` cannot be imported."""
    hide = f"import sys; sys.modules[{without!r}] = None; " if without else ""
    program = f"{hide}from pipeline.doctor import main; raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


def test_a_sound_installation_can_train() -> None:
    status, said = report()
    assert status == 0, said
    assert "torch" in said
    assert "loader: " in said


def test_without_ffcv_training_goes_on_with_the_other_loader() -> None:
    status, said = report(without="ffcv")
    assert status == 0
    assert "make ffcv" in next(line for line in said.splitlines() if " ffcv " in line)
    assert "loader: pil for everything" in said


def test_without_torch_nothing_trains() -> None:
    status, said = report(without="torch")
    assert status == 1
    assert "make setup" in said
