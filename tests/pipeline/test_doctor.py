"""The doctor says what is there, what is not, and the command that mends it."""

import subprocess
import sys

import pytest
from paths import ROOT

from ibeton.pipeline.doctor import Finding, has_kernels, loader_line, main


def report(*, without: str = "", first: str = "") -> tuple[int, str]:
    """Run the doctor in a new process, in which the module `without` cannot be imported, and which
    runs `first` before."""
    hide = f"import sys; sys.modules[{without!r}] = None; " if without else ""
    program = f"{hide}{first}\nfrom pipeline.doctor import main; raise SystemExit(main([]))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


@pytest.mark.slow
def test_a_sound_installation_can_train() -> None:
    status, said = report()
    assert status == 0, said
    assert "torch" in said
    assert "loader: " in said


def test_it_takes_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--nonsense"])
    assert ended.value.code == 2
    assert "unknown option --nonsense" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_without_libturbojpeg_training_uses_the_other_loader() -> None:
    status, said = report(
        first="from ibeton.pipeline.store import turbojpeg; turbojpeg._NAMES = ()"
    )
    assert status == 0
    assert "make ffcv" in next(line for line in said.splitlines() if " libturbojpeg " in line)
    assert "loader: pil for everything" in said


def test_without_torch_nothing_trains() -> None:
    status, said = report(without="torch")
    assert status == 1
    assert "make setup" in said


def test_without_numpy_libturbojpeg_is_not_said_to_be_missing() -> None:
    status, said = report(without="numpy")
    assert status == 1
    line = next(line for line in said.splitlines() if " libturbojpeg " in line)
    assert "unknown without numpy   -> make setup" in line
    assert "loader: none, training cannot start" in said


def test_a_package_that_training_needs_is_looked_for() -> None:
    status, said = report(without="safetensors")
    assert status == 1
    assert " - safetensors  missing   -> make setup" in said


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("sm_70 sm_90a", 90, True),
        ("sm_100a", 103, False),
        ("sm_100f", 103, True),
        ("sm_80", 86, True),
        ("sm_86", 80, False),
        ("sm_80", 90, False),
        ("sm_80 compute_80", 120, True),
        ("compute_90a", 100, False),
        ("compute_90", 80, False),
        ("", 90, False),
    ],
)
def test_kernels_run_on_later_gpus_as_nvidia_promises(
    built: str, capability: int, runs: bool
) -> None:
    assert has_kernels(built.split(), capability) is runs


def test_the_loader_is_told_that_training_will_use() -> None:
    def line(ffcv: bool, dali: bool, cuda: bool) -> str:
        return loader_line(
            {
                "libturbojpeg": Finding("libturbojpeg", "", "" if ffcv else "make ffcv"),
                "nvidia.dali": Finding("nvidia.dali", "", "" if dali else "pip install"),
                "device": Finding("device", "", cuda=cuda),
            }
        )

    assert line(True, True, True).startswith("ffcv for .beton files, pil for photo folders; dali")
    assert line(False, True, True).startswith("dali for everything; to get ffcv: ")
    assert line(False, True, False).startswith("pil for everything, slower; dali")
    assert line(False, False, True).startswith("pil for everything, slower; to get ffcv: ")
