"""The .beton files of `pipeline.convert --shard` -> the one file that one conversion writes.

    python -m pipeline.convert.merge A.beton B.beton ... OUT.beton

The shards may come in any order; all N of them must. Photos are copied as they are, none is
decoded, and every byte is held against the checksums that the conversion left. OUT.beton and its
JSON appear only when they are whole, and are byte for byte those of a conversion without --shard.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ibeton.command import run_command
from ibeton.options import Parser, add_options, fill, option
from ibeton.pipeline.convert.converter import check_destination
from ibeton.pipeline.convert.stored import checksum
from ibeton.pipeline.convert.verify import BLOCK
from ibeton.pipeline.store.beton import BetonReader, sidecar_path
from ibeton.pipeline.store.beton_writer import BetonWriter
from ibeton.progress import progress

_SAME = {  # what the JSON of all shards must agree in
    "classes": "other classes",
    "listing": "a listing of other photos",
    "options": "other options",
}


@dataclass(frozen=True)
class MergeOptions:
    """How to merge."""

    overwrite: bool = option(False, "replace an existing OUT")


@dataclass(frozen=True)
class Shard:
    """A part of a conversion: number `number` of `of`, from 1; `notes` are its JSON's."""

    path: Path
    number: int
    of: int
    notes: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """Those that it must have in common with the other shards."""
        return {**self.notes["options"], "shard": ""}


def merge(paths: list[str | Path], out: str | Path, overwrite: bool = False) -> int:
    """Write the photos of the shards `paths` to `out`, in the order of one conversion, and the JSON
    beside it; returns how many there are.

    Raises ValueError, naming the file and what is wrong with it, for what is no shard, is damaged,
    does not belong to the others, comes twice or is missing; FileNotFoundError and FileExistsError
    as `convert` does. Whatever is raised, nothing is left behind.
    """
    out = Path(out)
    check_destination(out, overwrite)
    shards = _complete(sorted((_shard(Path(path)) for path in paths), key=lambda s: s.number))
    if any(out.exists() and out.samefile(shard.path) for shard in shards):
        raise ValueError(f"{out} is one of the shards; give another name for OUT")
    photos = sum(shard.notes["photos"] for shard in shards)
    # One conversion keeps room for the photos that turn out unreadable, too.
    most = photos + sum(len(shard.notes["unreadable"]) for shard in shards)
    checksums: list[int] = []
    with BetonWriter(out, most) as writer, progress("merge", photos) as advance:
        for shard in shards:
            for count in _copy(shard, writer, checksums):
                advance(count)
        writer.seal()
        writer.publish(_sidecar(shards, photos, checksums))
    return photos


def _shard(path: Path) -> Shard:
    """What the JSON beside a shard tells. Raises ValueError for one that tells of no shard."""
    notes = BetonReader(path).sidecar
    missing = "it has no JSON beside it" if not notes else "it was converted without --shard"
    try:
        number, of = (int(part) for part in notes["options"]["shard"].split("/"))
        if notes["checksums"]["samples"] != BLOCK:
            missing = "its checksums are of another version"
            raise KeyError
        for key in (*_SAME, "photos", "unlabelled", "counts", "unreadable"):
            notes[key]
    except (KeyError, ValueError, TypeError):
        raise ValueError(
            f"{path} is no shard: {missing}; make it with pipeline.convert --shard, and keep"
            f" {sidecar_path(path)} beside it"
        ) from None
    return Shard(path, number, of, notes)


def _complete(shards: list[Shard]) -> list[Shard]:
    """`shards`, sorted, if they are all parts of one conversion. Raises ValueError if not."""
    first = shards[0]
    for shard in shards[1:]:
        if shard.of != first.of:
            raise ValueError(
                f"{shard.path} is one of {shard.of} shards, {first.path} one of {first.of};"
                " merge those of one conversion"
            )
        for key, what in _SAME.items():
            one, other = (s.options if key == "options" else s.notes[key] for s in (first, shard))
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
        raise ValueError(
            f"{len(lost)} of {first.of} shards are missing: --shard {numbers}"
            f"{', ...' if len(lost) > 10 else ''}; convert and give them too"
        )
    return shards


def _difference(one: Any, other: Any) -> str:
    """The first thing in which two entries differ, for a message."""
    if isinstance(one, dict):
        key = next(k for k in {**one, **other} if one.get(k) != other.get(k))
        return f"{key} is {other.get(key)}, not {one.get(key)}"
    if isinstance(one, list):
        odd = sorted(set(one) ^ set(other))
        return f"{odd[0]} is a class of one of them only" if odd else "they stand in another order"
    return f"{other}, not {one}"


def _copy(shard: Shard, writer: BetonWriter, checksums: list[int]) -> Iterator[int]:
    """Append all samples of a shard; yields how many after each of its blocks that was found as it
    was written. `checksums` are those of the merged file's blocks."""
    reader = BetonReader(shard.path)
    noted, classes = shard.notes["checksums"]["crc32"], len(reader.classes)
    if len(reader) != shard.notes["photos"] or len(noted) != -(-len(reader) // BLOCK):
        raise ValueError(
            f"{shard.path} holds {len(reader):,} photos, its JSON tells of"
            f" {shard.notes['photos']:,}; convert it anew"
        )
    if ((reader.labels < -1) | (reader.labels >= max(classes, 1))).any():
        raise ValueError(f"{shard.path} has labels outside its {classes} classes; convert it anew")
    for number, crc in enumerate(noted):
        first = number * BLOCK
        end = min(first + BLOCK, len(reader))
        found = 0
        for i in range(first, end):
            place = (reader.labels[i], reader.modes[i], reader.widths[i], reader.heights[i])
            label, mode, width, height = map(int, place)
            sample = (label, mode, width, height, reader.photo_bytes(i))
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
    counts: dict[str, int] = {}
    for shard in shards:
        for how, count in shard.notes["counts"].items():
            counts[how] = counts.get(how, 0) + count
    first = shards[0]
    together = {
        "options": first.options,
        "photos": photos,
        "unlabelled": sum(shard.notes["unlabelled"] for shard in shards),
        "counts": counts,
        "unreadable": [pair for shard in shards for pair in shard.notes["unreadable"]],
        "checksums": {"samples": BLOCK, "crc32": checksums},
    }
    kept = {key: value for key, value in first.notes.items() if key != "file_bytes"}
    return {**kept, **together}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for bad input, 1 for a failure on the way."""
    about = (__doc__ or "").split("\n")[0]
    parser = Parser(prog="python -m pipeline.convert.merge", description=about)
    parser.add_argument("shards", nargs="+", help="the files of all shards, in any order")
    parser.add_argument("out", help="the .beton file to write")
    add_options(parser, MergeOptions)
    given = vars(parser.parse_args(argv))

    def act() -> int:
        out = Path(given["out"])
        photos = merge(given["shards"], out, fill(MergeOptions, given).overwrite)
        print(
            f"{out}: {photos:,} photos of {len(given['shards'])} shards,"
            f" {out.stat().st_size / 1e6:,.1f} MB"
        )
        return 0

    return run_command(act)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
