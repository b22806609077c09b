"""Files appear under their names only when they are complete."""

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Names of temporary files, also those that earlier versions gave with a process's number.
PARTIAL = re.compile(r"\..+\.([0-9a-f]{8}|\d+)\.partial(\.[\w.]+)?")


def partial_name(path: Path, suffix: str = "") -> Path:
    """A name for what becomes `path` once it is complete: `.NAME.RANDOM.partial`, plus `suffix`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial{suffix}")


@contextmanager
def replacing(path: str | Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary file beside `path`; rename it to `path` when the block ends, remove it when
    the block raises.

    The temporary file is new and empty (never a link that someone put there) and is called
    `partial_name`; `suffix` is for libraries that choose a format by it.
    """
    path = Path(path)
    partial = partial_name(path, suffix)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write on a full disk names no file
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, all of it or nothing."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync_folder(folder: str | Path) -> None:
    """fsync the directory, so that renames in it survive a power failure. Does nothing on a file
    system that cannot flush directories (CIFS before Linux 5.9)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
