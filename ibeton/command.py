"""How commands end: one sentence and an exit status, whatever happens."""

import signal
import sys
from collections.abc import Callable

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


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def run_command(action: Callable[[], int], writes: bool = True) -> int:
    """Run `action` and return its exit status, or 2 for bad input, 1 for a failure during the work
    and 130 for an interrupt (SIGTERM included). `writes`: add to failures that nothing was written;
    give False for actions that keep a part."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return action()
    except _BAD_INPUT as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        print(f"error: {error}{'; nothing was written' if writes else ''}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
