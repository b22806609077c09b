"""Without the optional packages the core works, and what needs one says how to install it."""

import os
import subprocess
import sys

import pytest
from paths import ROOT
from small_runs import SMALL_MODEL, noise_beton

from ibeton.command import EXTRAS

# Runs commands one after the other as if no optional package were installed.
WITHOUT = """
import importlib.util, sys
sys.path.insert(0, {root!r})
find = importlib.util.find_spec
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
importlib.util.find_spec = lambda name: None if name in {missing!r} else find(name)
from ibeton.__main__ import main
for command in {commands!r}:
    try:
        status = main(command)
    except SystemExit as stop:
        status = stop.code
    print("status", status, file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command says on stderr, with its exit status."""
    folder = tmp_path_factory.mktemp("without")
    data = ["--data", str(noise_beton(folder, 16)), "--epochs", "1", "--warmup-epochs", "0"]
    small = [*SMALL_MODEL, "--batch-size", "8", *data, "--output-dir", str(folder / "run")]
    labeled = ["--eval-train", data[1], "--eval-val", data[1]]
    commands = {
        "train": ["train", *small],
        "evaluate": ["train", *data, "--eval-every", "1", *labeled],
        "swin": ["train", "--arch", "swin_t7", *data, "--batch-size", "2", "--device", "cpu"],
        "compare": ["runs", "compare", str(folder / "run"), str(folder / "run")],
        "show": ["show", "--help"],
    }
    names = {"root": str(ROOT), "missing": tuple(EXTRAS), "commands": [*commands.values()]}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(**names)],
        **{"cwd": folder, "capture_output": True, "text": True, "check": True},
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (folder / "run" / "backbone.safetensors").exists()
    assert not (folder / "run" / "curves.png").exists()
    *parts, rest = done.stderr.split("status ")
    assert rest.strip() == "2"
    texts = [f"{a}status {b[0]}" for a, b in zip(parts, [*parts[1:], rest], strict=True)]
    return dict(zip(commands, texts, strict=True)) | {"stdout": done.stdout}


def test_a_run_needs_none_of_them(said: dict[str, str]) -> None:
    assert said["train"].endswith("status 0")
    assert "plot none (matplotlib is not installed" in " ".join(said["stdout"].split())


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("evaluate", "sklearn", "cluster"),
        ("swin", "timm", "timm"),
        ("compare", "matplotlib", "plots"),
        ("show", "matplotlib", "plots"),
    ],
)
def test_what_needs_one_names_its_extra_and_ends_with_status_2(
    said: dict[str, str], command: str, package: str, extra: str
) -> None:
    last, status = said[command].strip().splitlines()[-2:]
    assert last.startswith("error: ")
    assert f"{package} is not installed: `make setup` or `pip install -e '.[{extra}]'`" in last
    assert status == "status 2"
