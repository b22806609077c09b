"""How the commands of this package end: one sentence and an exit status, whatever happens."""

import signal
import sys
from collections.abc import Callable

# What a user can put right by another option or file. FileExistsError and the like are OSErrors,
# of which the others are failures on the way.
_BAD_INPUT = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    PermissionError,
)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def run_command(action: Callable[[], int], writes: bool = True) -> int:
    """Run `action` and return its exit status, or 2 for bad input, 1 for a failure on the way and
    130 for an interrupt (SIGTERM counts as one). `writes`: what `action` raises adds that nothing
    was written; one that keeps a part speaks for itself."""
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
