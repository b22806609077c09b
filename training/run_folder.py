"""The folder of a run: which run it belongs to, which process writes to it, and how it was run.

    config.json     the settings, as resolved
    run.json        the run's name, its state, and each start: command, code, versions, machine
    log.jsonl, tensorboard/, curves.png, checkpoint*.pt

A run has one folder and a folder one run. The process that writes to it holds a lock on `.lock`,
which the kernel releases however the process ends.
"""

import fcntl
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from ibeton.atomic import write_text
from ibeton.options import flag
from ibeton.training import checkpoints

RUN, CONFIG, LOCK = "run.json", "config.json", ".lock"
_CODE = Path(__file__).parents[1]
_LOCK_S = 1.0  # `ibeton runs` may hold the lock for a moment
_GIT_S = 5.0  # on a large or remote file system git may take minutes
_PACKAGES = ("torch", "triton", "numpy", "numba", "ffcv", "nvidia-dali-cuda120", "timm", "pillow")


def read_run(folder: Path) -> dict[str, Any]:
    """The content of run.json; empty if there is none. Raises ValueError if it is damaged."""
    return _read(folder / RUN)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json, likewise."""
    return _read(folder / CONFIG)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it is not an object of JSON")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or remove it") from error
    return content


def identity(folder: Path) -> str:
    """The name of the run that the folder belongs to; "" if it is free."""
    return str(read_run(folder).get("id", ""))


def check_unused(folder: Path) -> None:
    """Raise ValueError if `folder` holds a run or checkpoints. Only rank 0 may ask: it fills the
    folder, perhaps before the other ranks come here."""
    if identity(folder) or checkpoints.listed(folder):
        raise ValueError(
            f"{folder} already holds a run: continue it with --resume auto, or give another"
            " --output-dir"
        )


def changed(before: dict[str, Any], now: dict[str, Any], free: Collection[str]) -> str:
    """The settings that differ and are not `free`, as "--name old is now new"; "" where none is."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return ", ".join(
        f"{flag(name)} {before.get(name)} is now {value}"
        for name, value in now.items()
        if name not in free and plain(before.get(name)) != plain(value)
    )


def new_identity() -> str:
    """A name that no other run has."""
    return uuid.uuid4().hex[:12]


def is_held(folder: Path) -> bool:
    """Whether a process writes to the folder now (here, or wherever locks are shared)."""
    try:
        with open(folder / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _lock(file: IO[str]) -> bool:
    """Lock `file`; False if another process holds it for longer than `is_held` does to look."""
    deadline = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOCK_S / 20)


class RunFolder:
    """Holds `folder` for run `name`, from construction until `close`, and keeps its run.json.

    `seen`: the folder's run at start-up; `begins`: "step", "steps_per_epoch" and "processes" of
    this start. Raises ValueError if another process holds the folder, or has since started another
    run in it; OSError if it cannot be written.
    """

    def __init__(
        self, folder: Path, name: str, seen: str, config: dict[str, Any], begins: dict[str, int]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder
        self._lock = open(folder / LOCK, "a")  # noqa: SIM115 - held as long as self
        if not _lock(self._lock) or identity(folder) != seen:
            self._lock.close()
            raise ValueError(
                f"{folder} is in use by another process: wait for it, or give another --output-dir"
            )
        checkpoints.clean(folder)
        self._write(CONFIG, config)
        self._run = {"id": name, "state": "running", "starts": []} | read_run(folder)
        self._run["starts"].append(_start() | begins)
        self._note("running")

    def close(self, state: str) -> None:
        """Write `state` (stopped, finished, interrupted, or failed with a reason) to run.json, and
        release the folder."""
        try:
            self._note(state)
        finally:
            self._lock.close()

    def _note(self, state: str) -> None:
        self._run |= {"state": state, "since": _now()}
        self._write(RUN, self._run)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        write_text(self.path / name, json.dumps(content, indent=2) + "\n")


def _start() -> dict[str, Any]:
    return {
        "time": _now(),
        "command": shlex.join([sys.executable, *sys.argv]),
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "code": _code_state(),
        "versions": _versions(),
    }


def _code_state() -> dict[str, Any]:
    """The commit of this code and the tracked files that differ from it; empty without git,
    "unknown" if git takes more than a few seconds."""
    try:
        commit = _git("rev-parse", "HEAD").strip()
        changed = _git("status", "--porcelain", "--untracked-files=no").splitlines()
    except subprocess.TimeoutExpired:
        return {"commit": "unknown", "changed": "unknown"}
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "changed": [line[3:] for line in changed]}


def _git(*arguments: str) -> str:
    # `git status` locks the index for a moment, in which a user's `git commit` would fail.
    command = ["git", "--no-optional-locks", "-C", str(_CODE), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=_GIT_S
    ).stdout


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
