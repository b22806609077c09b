"""Runs commands: an error is one sentence and an exit status."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

# Errors that another option or file would fix. Other OSErrors are failures during the work.
_BAD_INPUT = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    PermissionError,
)


# package that only some commands need -> the extra of setup.py that installs it
EXTRAS = {
    "timm": "timm",
    "matplotlib": "plots",
    "sklearn": "cluster",
    "scipy": "cluster",
    "transformers": "export",
    "faster_coco_eval": "dense",
}


def missing_extra(package: str | None) -> str:
    """How to install the optional package that an import lacks; "" if it is none of EXTRAS."""
    top = (package or "").split(".")[0]
    if top not in EXTRAS:
        return ""
    return f"{top} is not installed: `make setup` or `pip install -e '.[{EXTRAS[top]}]'` does it"


class Failure(RuntimeError):
    """The work cannot continue. The message says why, in a sentence."""


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def run_command(action: Callable[[], int], writes: bool = True) -> int:
    """Run `action` and return its exit status, or 2 for bad input, 1 for a failure during the work
    and 130 for an interrupt (SIGTERM included). `writes`: add to failures that nothing was written;
    give False for actions that keep a part."""
    signal.signal(signal.SIGTERM, _interrupt)
    protect_output()
    try:
        return action()
    except _BAD_INPUT as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        print(f"error: {error}{'; nothing was written' if writes else ''}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if not (words := missing_extra(error.name)):
            raise
        print(f"error: {words}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


def protect_output() -> None:
    """Let no failure of stdout or stderr end a command: characters that their encoding lacks are
    escaped, and after a failed write (full disk, closed pipe) further output is dropped. The exit
    status depends on the work, not on its output."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Protected(stream))


class _Protected:
    """A text stream whose writes do not raise OSError."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lost(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        """Discard what is buffered and all that follows."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if not isinstance(error, BrokenPipeError) and self._stream is sys.__stdout__:
            print(f"output is lost from here on: {error}", file=sys.stderr)
