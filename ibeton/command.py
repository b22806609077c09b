"""Runs commands: an error is one sentence and an exit status."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

# Errors that another option, file or package would fix. Other OSErrors are failures during the
# work.
_BAD_INPUT = (
    *(ValueError, ModuleNotFoundError),
    *(FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError),
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


# A class of torch's, which this file does not import, or a message -> what it means.
_SHORTAGES = {
    "OutOfMemoryError": "the GPU has too little memory: give a smaller --batch-size",
    "can't start new thread": "no more threads can be started here: give fewer --workers",
}


def amount(count: int, one: str, several: str = "") -> str:
    """A count with its noun: "1 worker", "3 workers". `several`: a plural other than with -s."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def explain(error: BaseException) -> str:
    """What went wrong, in a sentence, if it is something that a user can cause; "" for a bug."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        text = where + error.strerror
    if isinstance(error, Failure | OSError):
        return text
    if told := _SHORTAGES.get(type(error).__name__, _SHORTAGES.get(text, "")):
        return told
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"there is too little memory: give a smaller --batch-size or model ({_last(text)})"
    if isinstance(error, ModuleNotFoundError):
        return missing_extra(error.name)
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return worker_failure(error)
    return ""


def worker_failure(error: Exception) -> str:
    """What an error of a DataLoader means, in a sentence. Torch names workers that were killed; one
    that dies while it hands over shared memory breaks the connection."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    cut_off = isinstance(error, ConnectionError | EOFError)
    if not cut_off and not lines[0].startswith("DataLoader worker"):
        return lines[-1]
    return (
        "a worker process of the loader was killed, perhaps for lack of memory: try fewer --workers"
        f" ({type(error).__name__ if cut_off else lines[0]})"
    )


def refusal(error: BaseException) -> str:
    """As `explain`, for what ends a command before its work begins: any ValueError then explains
    itself."""
    return explain(error) or (str(error) if isinstance(error, ValueError) else "")


def _last(text: str) -> str:
    """The last sentence of a message, without what stands before a colon in torch's."""
    return text.strip().splitlines()[-1].rpartition("memory: ")[2] if text.strip() else "no details"


def run_command(action: Callable[[], int], writes: bool = True) -> int:
    """Run `action` and return its exit status, or 2 for bad input, 1 for a failure during the work
    that `explain` knows, and 130 for an interrupt (SIGTERM included). `writes`: add to failures
    that nothing was written; give False for actions that keep a part."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt
    protect_output()
    nothing = "; nothing was written" if writes else ""
    try:
        return action()
    except Exception as error:
        message, bad_input = refusal(error), isinstance(error, _BAD_INPUT)
        if not message:
            raise
        print(f"error: {message}{'' if bad_input else nothing}", file=sys.stderr)
        return 2 if bad_input else 1
    except KeyboardInterrupt:
        print(f"interrupted{nothing}", file=sys.stderr)
        return 130


def run_or_exit(action: Callable[[], object]) -> int:
    """Run an action that keeps what it has written. Returns 0, or raises SystemExit with the status
    of `run_command`."""

    def act() -> int:
        action()
        return 0

    if status := run_command(act, writes=False):
        raise SystemExit(status)
    return 0


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
