"""What install.sh says where the system's packages cannot be installed."""

import shutil
import subprocess
from pathlib import Path

import pytest
from paths import ROOT

TOOLS = ("sh", "env", "mkdir", "tail")


@pytest.mark.parametrize(
    ("user", "apt", "why"),
    [
        (0, False, "there is no apt-get here"),
        (1000, True, "installing needs root"),
        (0, True, "apt-get failed (see venv/install.log)"),
    ],
)
def test_the_reason_is_told(user: int, apt: bool, why: str, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    stubs = {
        **{"id": f"echo {user}", "pkg-config": "exit 1", "python3": "exit 0"},
        # No library and no headers are found; the doctor finds no fault.
        "venv/bin/python": 'case "$*" in *version_info*) echo 3.11;; -c*) exit 1;; esac',
        **dict.fromkeys(("venv/bin/pip", "venv/bin/uv"), "exit 0"),
        **({"apt-get": "echo offline; exit 100"} if apt else {}),
    }
    for name, program in stubs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{program}\n")
        path.chmod(0o755)
    for tool in TOOLS:
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    done = subprocess.run(
        [tmp_path / "sh", ROOT / "install.sh", "ffcv"],
        cwd=tmp_path,
        env={"PATH": str(tmp_path), "VENV": "venv"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"no libturbojpeg: {why}" in done.stdout
    assert f"no ffcv, which needs system packages: {why}" in done.stdout
    assert "Training will use another loader." in done.stdout
    log = (venv / "install.log").read_text()
    assert log.count("offline") == (4 if "failed" in why else 0), "both attempts are in the log"
