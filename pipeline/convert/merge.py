"""Combine the .beton files of `ibeton convert --shard` into that of one conversion.

    ibeton merge A.beton B.beton ... OUT.beton

Shards may be given in any order, but all of them. Photos are copied without being decoded, and
every byte is compared with the checksums of the conversion. OUT.beton and its JSON appear only when
they are complete, and equal those of a conversion without --shard byte for byte.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from ibeton.command import run_command
from ibeton.options import Parser
from ibeton.pipeline.convert.converter import check_destination
from ibeton.pipeline.convert.stored import checksum
from ibeton.pipeline.convert.verify import BLOCK
from ibeton.pipeline.store.beton import BetonReader, sidecar_path
from ibeton.pipeline.store.beton_writer import BetonWriter
from ibeton.progress import progress

_SAME = {  # what the JSON files of all shards must have in common
    "classes": "other classes",
    "listing": "a listing of other photos",
    "options": "other options",
}


class Shard:
    """A part of a conversion: number `number` of `of`, from 1; `notes` are its JSON's.

    Raises ValueError for a file that is not a shard."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.notes = Path(path), BetonReader(path).sidecar
        notes = self.notes
        missing = "it was converted without --shard" if notes else "it has no JSON beside it"
        try:
            self.number, self.of = (int(part) for part in notes["options"]["shard"].split("/"))
            if notes["checksums"]["samples"] != BLOCK:
                missing = "its checksums are of another version"
                raise KeyError
            self.shared = {key: notes[key] for key in _SAME}
            self.shared["options"] = {**notes["options"], "shard": ""}
            for key in ("photos", "unlabelled", "counts", "unreadable"):
                notes[key]
        except (KeyError, ValueError, TypeError):
            raise ValueError(
                f"{path} is not a shard: {missing}; make it with ibeton convert --shard, and keep"
                f" {sidecar_path(path)} beside it"
            ) from None


def merge(paths: list[str | Path], out: str | Path, overwrite: bool = False) -> int:
    """Write the photos of the shards `paths` to `out`, and its JSON; returns how many there are.

    Raises ValueError, naming the file and the reason, for a file that is not a shard, is damaged,
    belongs to another conversion, is given twice or missing, or if all are empty;
    FileNotFoundError and FileExistsError as `convert` does. In any case nothing is left behind.
    """
    out = Path(out)
    check_destination(out, overwrite)
    shards = sorted(map(Shard, paths), key=lambda shard: shard.number)
    _check_complete(shards)
    if any(out.exists() and out.samefile(shard.path) for shard in shards):
        raise ValueError(f"{out} is one of the shards; give another name for OUT")
    photos = sum(shard.notes["photos"] for shard in shards)
    if not photos:
        raise ValueError(f"none of {len(shards)} shards holds a readable photo")
    # A conversion reserves space for unreadable photos, too.
    most = photos + sum(len(shard.notes["unreadable"]) for shard in shards)
    checksums: list[int] = []
    with BetonWriter(out, most) as writer, progress("merge", photos) as advance:
        for shard in shards:
            for count in _copy(shard, writer, checksums):
                advance(count)
        writer.seal()
        writer.publish(_sidecar(shards, photos, checksums))
    return photos


def _check_complete(shards: list[Shard]) -> None:
    """Raise ValueError unless `shards`, sorted, are all parts of one conversion."""
    first = shards[0]
    for shard in shards[1:]:
        if shard.of != first.of:
            raise ValueError(
                f"{shard.path} is one of {shard.of} shards, {first.path} one of {first.of};"
                " merge those of one conversion"
            )
        for key, what in _SAME.items():
            one, other = first.shared[key], shard.shared[key]
            if one != other:
                raise ValueError(
                    f"{shard.path} has {what} than {first.path}: {_difference(one, other)};"
                    " convert one of them anew"
                )
    for before, shard in pairwise(shards):
        if before.number == shard.number:
            raise ValueError(
                f"{before.path} and {shard.path} are both shard {shard.number} of {shard.of};"
                " give each once"
            )
    lost = sorted(set(range(1, first.of + 1)) - {shard.number for shard in shards})
    if lost:
        numbers = ", ".join(f"{number}/{first.of}" for number in lost[:10])
        numbers += ", ..." if len(lost) > 10 else ""
        raise ValueError(
            f"{len(lost)} of {first.of} shards are missing: --shard {numbers}; convert and give"
            " them too"
        )


def _difference(one: Any, other: Any) -> str:
    """The first difference of two entries, for a message."""
    if isinstance(one, dict):
        key = next(k for k in {**one, **other} if one.get(k) != other.get(k))
        return f"{key} is {other.get(key)}, not {one.get(key)}"
    if isinstance(one, list):
        odd = sorted(set(one) ^ set(other))
        return f"{odd[0]} is a class of one of them only" if odd else "their order is different"
    return f"{other}, not {one}"


def _copy(shard: Shard, writer: BetonWriter, checksums: list[int]) -> Iterator[int]:
    """Append all samples of a shard; yields the size of each block that has its checksum.
    `checksums` are those of the merged file's blocks."""
    reader = BetonReader(shard.path)
    noted, classes = shard.notes["checksums"]["crc32"], len(reader.classes)
    if len(reader) != shard.notes["photos"] or len(noted) != -(-len(reader) // BLOCK):
        raise ValueError(
            f"{shard.path} holds {len(reader):,} photos, but its JSON says"
            f" {shard.notes['photos']:,}; convert it anew"
        )
    if ((reader.labels < -1) | (reader.labels >= max(classes, 1))).any():
        raise ValueError(f"{shard.path} has labels outside its {classes} classes; convert it anew")
    for first, crc in zip(range(0, len(reader), BLOCK), noted, strict=True):
        end, found = min(first + BLOCK, len(reader)), 0
        for i in range(first, end):
            sample = reader.sample(i)
            found = checksum(found, *sample)
            if writer.count % BLOCK == 0:
                checksums.append(0)
            writer.append(*sample)
            checksums[-1] = checksum(checksums[-1], *sample)
        if found != crc:
            raise ValueError(
                f"{shard.path} is damaged: photos {first} to {end - 1} are not as they were"
                f" written; convert it anew (--shard {shard.number}/{shard.of})"
            )
        yield end - first


def _sidecar(shards: list[Shard], photos: int, checksums: list[int]) -> dict[str, Any]:
    """The JSON of all shards together, as one conversion writes it."""
    notes = [shard.notes for shard in shards]
    together = {
        "options": shards[0].shared["options"],
        "photos": photos,
        "unlabelled": sum(each["unlabelled"] for each in notes),
        "counts": dict(sum((Counter(each["counts"]) for each in notes), Counter())),
        "unreadable": [pair for each in notes for pair in each["unreadable"]],
        "checksums": {"samples": BLOCK, "crc32": checksums},
    }
    kept = {key: value for key, value in notes[0].items() if key != "file_bytes"}
    return {**kept, **together}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for bad input, 1 for a failure on the way."""
    about = (__doc__ or "").split("\n")[0]
    parser = Parser(prog="ibeton merge", description=about)
    parser.add_argument("shards", nargs="+", help="the files of all shards, in any order")
    parser.add_argument("out", help="the .beton file to write")
    parser.add_argument(
        "--overwrite",
        action=argparse.BooleanOptionalAction,
        help="replace an existing OUT (default: False)",
    )
    given = parser.parse_args(argv)

    def act() -> int:
        photos = merge(given.shards, given.out, bool(given.overwrite))
        size = Path(given.out).stat().st_size / 1e6
        print(f"{given.out}: {photos:,} photos of {len(given.shards)} shards, {size:,.1f} MB")
        return 0

    return run_command(act)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
