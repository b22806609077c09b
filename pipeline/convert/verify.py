"""Read a .beton file back: every photo decodes, and every byte is the one that was written."""

import functools
from contextlib import closing

from ibeton.pipeline.convert.stored import checksum
from ibeton.pipeline.store.beton import BetonReader
from ibeton.pipeline.store.decode import UnreadablePhoto
from ibeton.progress import progress
from ibeton.workers import cores, in_order

BLOCK = 256  # samples under one checksum

Job = tuple[str, int, int]  # file, first sample, last sample + 1

_opened = functools.cache(BetonReader)  # one worker reads many blocks of one file


def verify(path: str, checksums: list[int] | None, classes: int, workers: int) -> list[str]:
    """Read every photo of the file; returns what is wrong with it, one sentence each.

    checksums: CRC-32 of each BLOCK of samples (`checksum`), or None for a file without them, whose
    photos are only decoded. classes: labels must be below it; 0: unknown. Raises what BetonReader
    raises.
    """
    reader = BetonReader(path)
    blocks = range(0, len(reader), BLOCK)
    if checksums is not None and len(checksums) != len(blocks):
        return [f"{path} has {len(blocks)} blocks of photos, {len(checksums)} were written"]
    problems = []
    if classes and ((reader.labels < -1) | (reader.labels >= classes)).any():
        problems.append(f"{path} has labels outside its {classes} classes")
    jobs: list[Job] = [(path, first, min(first + BLOCK, len(reader))) for first in blocks]
    with (
        progress("verify", len(reader)) as advance,
        closing(in_order(verify_block, jobs, workers)) as results,
    ):
        for number, ((_, first, end), (crc, unreadable)) in enumerate(
            zip(jobs, results, strict=True)
        ):
            problems += unreadable
            if checksums is not None and crc != checksums[number]:
                problems.append(f"{path}: photos {first} to {end - 1} are not as they were written")
            advance(end - first)
    return problems


def verify_block(job: Job) -> tuple[int, list[str]]:
    """Checksum of some samples and what is unreadable among them, in a worker process."""
    path, first, end = job
    reader = _opened(path)
    crc, problems = 0, []
    for i in range(first, end):
        crc = checksum(crc, *reader.sample(i))
        try:
            reader.pixels(i)
        except UnreadablePhoto as error:
            problems.append(f"{reader.name(i)}: {error}")
    return crc, problems


def verify_existing(path: str, workers: int) -> tuple[list[str], str]:
    """Faults of a finished .beton, and what to say if there are none. Without its JSON (FFCV's own
    files) photos are only decoded."""
    reader = BetonReader(path)
    noted = reader.sidecar.get("checksums", {})
    crc32 = noted.get("crc32") if noted.get("samples") == BLOCK else None
    faults = verify(path, crc32, len(reader.classes), workers or cores())
    if crc32 is None:
        return faults, f"{path}: every photo decodes; no checksums beside it to compare with"
    return faults, f"{path}: every photo reads as written"
