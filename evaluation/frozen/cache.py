"""Features on disk: computed once, by all ranks together, and found again by what they came from.

    checkpoint folder/features/<key>/blocks+cls/index.npy, blocks.npy, cls.npy

The key is a digest of the network's weights and settings, of the photos (`PhotoSet.fingerprint`),
of view, precision and kind of device, and of the code that computes them. A folder appears under
its name only when it is whole. Arrays are memory-mapped, so sets larger than the memory work.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torch.distributed as dist
from torch import nn

import ibeton
from ibeton.distributed import from_rank_0, rank_and_size
from ibeton.evaluation.frozen.features import (
    Extraction,
    Features,
    check_any,
    check_read,
    collect,
    feature_batches,
)
from ibeton.evaluation.networks import weights_digest
from ibeton.evaluation.photos import PhotoSet
from ibeton.model.head import IBOTHead

DAY_S = 86_400  # no array is left alone so long by a run that still computes it


def cached_features(
    folder: Path,
    backbone: nn.Module,
    config: dict[str, Any],
    photos: PhotoSet,
    names: Sequence[str],
    how: Extraction,
    head: IBOTHead | None = None,
) -> Features:
    """Features by name, as `features.extract` gives them, from `folder` if they are there;
    else computed and kept. They are memory-mapped.

    Where torch.distributed is initialized every rank calls it, and computes its share; the folder
    must be one that all of them see. `config` says what the weights do not (heads, windows).
    Raises ValueError if no photo can be read, a cached array is damaged or the disk is full.
    """
    key = features_key(backbone, config, photos, how, head)
    entry = from_rank_0(lambda: _find(folder / key, names))
    if entry is None:
        entry = _extract_to(folder / key, backbone, photos, sorted(names), how, head)
    indices = _load(entry / "index.npy")
    check_read(photos, len(indices))
    arrays = {name: _load(entry / f"{name}.npy") for name in names}
    return Features(arrays, torch.from_numpy(photos.labels[indices]))


def features_key(
    backbone: nn.Module,
    config: dict[str, Any],
    photos: PhotoSet,
    how: Extraction,
    head: IBOTHead | None,
) -> str:
    """Sixteen hexadecimal digits that change with anything that changes features."""
    digest = hashlib.sha256()
    for module in (backbone, head):
        digest.update(type(module).__name__.encode())
        if module is not None:
            digest.update(weights_digest(module).encode())
    device = torch.device(how.device).type
    settings = [config, photos.size, str(how.dtype()), device, torch.__version__, PIL.__version__]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update((photos.fingerprint() + _code()).encode())
    return digest.hexdigest()[:16]


@cache
def _code() -> str:
    """A digest of the code between photos and features."""
    digest = hashlib.sha256()
    package = Path(ibeton.__file__).parent
    sources = [package / "evaluation" / "photos.py", Path(__file__).with_name("features.py")]
    for room in ("pipeline/store", "model"):
        sources += sorted((package / room).rglob("*.py"))
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _find(folder: Path, names: Sequence[str]) -> Path | None:
    """A whole entry that holds at least `names`."""
    for entry in sorted(folder.glob("[!.]*")):
        if set(names) <= set(entry.name.split("+")):
            return entry
    return None


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="c")  # private: torch wants memory that may be written
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove {path.parent}") from error


def _new_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """An array in a new file whose space is reserved: of a file with holes, a full disk would kill
    the process with SIGBUS at some later write. Raises ValueError if there is too little space."""
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        _reserve(path)
    except OSError as error:
        raise ValueError(
            f"{path.parents[2]}: the feature {path.stem} takes"
            f" {math.prod(shape) * dtype.itemsize:,} bytes ({error.strerror}): make room, or give"
            " another folder with --cache"
        ) from error
    return array


def _reserve(path: Path) -> None:
    """Reserve the space of a file with holes, on a file system that can. Raises OSError if there is
    too little."""
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise


def _extract_to(
    folder: Path,
    backbone: nn.Module,
    photos: PhotoSet,
    names: list[str],
    how: Extraction,
    head: IBOTHead | None,
) -> Path:
    """Compute all features, each rank a run of the photos, and give the entry that holds them."""
    rank, world = rank_and_size()

    def begin() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".partial-*"):  # by a run that was killed
            with suppress(OSError):  # of another user, or finished just now
                last = max(path.stat().st_mtime for path in (left, *left.iterdir()))
                if last < time.time() - DAY_S:
                    shutil.rmtree(left)
        return tempfile.mkdtemp(prefix=".partial-", dir=folder)

    partial = Path(from_rank_0(begin))
    try:
        share = np.array_split(np.arange(len(photos)), world)[rank]

        def allocate(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
            return _new_array(partial / f"{name}.{rank}", shape, dtype)

        batches = feature_batches(backbone, photos, names, share, how, head)
        arrays, indices = collect(batches, len(share), allocate)
        with open(partial / f"index.{rank}", "wb") as file:
            np.save(file, indices)
        for array in arrays.values():
            array.flush()  # type: ignore[attr-defined]  # a view of a np.memmap is one, too
        del arrays
        if world > 1:
            dist.barrier()
        return from_rank_0(lambda: _finish(partial, folder / "+".join(names), names, photos, world))
    finally:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def _finish(partial: Path, entry: Path, names: list[str], photos: PhotoSet, world: int) -> Path:
    """Make one array of the ranks' and give the folder its name."""
    try:
        indices = [np.load(partial / f"index.{rank}") for rank in range(world)]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error.filename} is not there: the ranks must share the folder of --cache"
        ) from error
    check_any(photos, sum(map(len, indices)))
    for name in names:
        shards = [
            np.load(partial / f"{name}.{rank}", mmap_mode="r")[: len(kept)]
            for rank, kept in enumerate(indices)
            if len(kept)
        ]
        if len(shards) == 1 and len(shards[0]) == len(photos):
            os.replace(partial / f"{name}.0", partial / f"{name}.npy")
        else:
            shape = (sum(map(len, shards)), *shards[0].shape[1:])
            whole = _new_array(partial / f"{name}.npy", shape, shards[0].dtype)
            np.concatenate(shards, out=whole)
            whole.flush()
    np.save(partial / "index.npy", np.concatenate(indices))
    for leftover in partial.glob("*.[0-9]*"):
        leftover.unlink()
    for path in partial.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    partial.chmod(0o755)
    try:
        os.rename(partial, entry)
    except OSError:  # another process came first, with the same key and so the same features
        if not entry.exists():
            raise
    return entry
