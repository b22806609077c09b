"""How commands end: one sentence and an exit status, whatever happens."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

# What a user can fix with another option or file. Other OSErrors are failures during the work.
_BAD_INPUT = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    PermissionError,
)


class Failure(RuntimeError):
    """Work cannot continue, for a reason that its message explains in a sentence."""


def explain(error: BaseException) -> str:
    """What went wrong, in a sentence, if it is something that a user can cause; "" for a bug."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return where + error.strerror
    if isinstance(error, Failure | OSError):
        return text
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which this file does not import
        return "the GPU has too little memory: give a smaller --batch-size"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"there is too little memory: give a smaller --batch-size or model ({_last(text)})"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        first = text.splitlines()[0]
        return f"a worker process was killed: is memory short? Try fewer --workers ({first})"
    return ""


def refusal(error: BaseException) -> str:
    """As `explain`, for what ends a command before its work begins: any ValueError then explains
    itself."""
    return explain(error) or (str(error) if isinstance(error, ValueError) else "")


def _last(text: str) -> str:
    """The last sentence of a message, without what stands before a colon in torch's."""
    return text.strip().splitlines()[-1].rpartition("memory: ")[2] if text.strip() else "no details"


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def run_command(action: Callable[[], int], writes: bool = True) -> int:
    """Run `action` and return its exit status, or 2 for bad input, 1 for a failure during the work
    that `explain` knows, and 130 for an interrupt (SIGTERM included). `writes`: add to failures
    that nothing was written; give False for actions that keep a part."""
    signal.signal(signal.SIGTERM, _interrupt)
    protect_output()
    nothing = "; nothing was written" if writes else ""
    try:
        return action()
    except _BAD_INPUT as error:
        print(f"error: {explain(error) or error}", file=sys.stderr)
        return 2
    except Exception as error:
        message = explain(error)
        if not message:
            raise
        print(f"error: {message}{nothing}", file=sys.stderr)
        return 1
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
    """Let nothing that stdout or stderr cannot take end a command: characters that their encoding
    lacks are escaped, and after a failed write (full disk, closed pipe) the rest is dropped. What
    was done decides the exit status, not what was printed of it."""
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
        """Send what is still buffered, and all that follows, nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if not isinstance(error, BrokenPipeError) and self._stream is sys.__stdout__:
            print(f"output is lost from here on: {error}", file=sys.stderr)
