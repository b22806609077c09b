"""What a conversion is to store: its options, and the photos in their order."""

import dataclasses
import hashlib
import os
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from ibeton.options import option, refuse, too_low, unknown_choices
from ibeton.pipeline.store.sources import Photo, Source

_LEAST_SIDE = 16  # of a photo from which views can be cut


@dataclass(frozen=True)
class ConvertOptions:
    """How to store the photos. Defaults lose nothing: JPEGs keep their bytes."""

    max_resolution: int = option(0, "shrink photos whose longer side has more pixels (0: none)")
    quality: int = option(90, "JPEG quality where a photo is encoded, 1 to 100")
    write_mode: str = option(
        "keep",
        "keep JPEG bytes; jpg: encode all anew; raw: pixels; smart: by size",
        ("keep", "jpg", "raw", "smart"),
    )
    smart_threshold: int = option(0, "smart: bytes of pixels above which a photo becomes JPEG")
    workers: int = option(0, "workers (0: all cores)")
    shuffle: bool = option(False, "store in random order")
    seed: int = option(0, "seed of --shuffle")
    subset: int = option(
        0, "number of photos to store: evenly spread, or random with --shuffle (0: all)"
    )
    shard: str = option("", "I/N: store the I-th of N equal parts, for `ibeton merge`")
    verify: bool = option(
        False, "decode every photo, and read each back before the file gets its name"
    )
    overwrite: bool = option(False, "replace an existing DST")
    restart: bool = option(False, "begin anew where an interrupted conversion left its part")

    def check(self) -> None:
        """Raise ValueError, naming the option, for values that cannot work."""
        counts = ("max_resolution", "smart_threshold", "workers", "seed", "subset")
        refuse([*too_low(self, {counts: 0}), *unknown_choices(self)])
        if 0 < self.max_resolution < _LEAST_SIDE:
            raise ValueError(
                f"--max-resolution {self.max_resolution}: expected 0 (keep sizes), or at least"
                f" {_LEAST_SIDE} pixels"
            )
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality {self.quality}: expected 1 to 100")
        if (self.write_mode == "smart") != (self.smart_threshold > 0):
            raise ValueError("--write-mode smart and --smart-threshold BYTES go together")
        self.part()

    def part(self) -> tuple[int, int]:
        """(I, N) of --shard, (1, 1) without. Raises ValueError for what is no part."""
        number, slash, of = (self.shard or "1/1").partition("/")
        good = slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)
        if not good:
            raise ValueError(f"--shard {self.shard}: expected I/N with I from 1 to N, such as 2/8")
        return int(number), int(of)

    def content(self) -> dict[str, Any]:
        """The options that decide what the file holds."""
        passing = ("workers", "verify", "overwrite", "restart")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in passing}


def chosen(source: Source, options: ConvertOptions) -> list[Photo]:
    """The photos to store, in the order to store them."""
    total = len(source.photos)
    if options.subset > total:
        raise ValueError(f"--subset {options.subset}: {source.path} has {total:,} photos")
    wanted = options.subset or total
    if options.shuffle:
        order = np.random.default_rng(options.seed).permutation(total)[:wanted]
    else:
        order = np.arange(wanted) * total // wanted
    return [source.photos[i] for i in order]


def shard(photos: list[Photo], options: ConvertOptions) -> list[Photo]:
    """Those of `--shard`: contiguous, so that the shards in turn are the whole."""
    number, of = options.part()
    if of > len(photos):
        raise ValueError(f"--shard {options.shard}: there are {len(photos):,} photos to store")
    if of == 1:
        return photos
    return photos[(number - 1) * len(photos) // of : number * len(photos) // of]


def listing(photos: list[Photo]) -> str:
    """A digest of what is to be stored and in what order."""
    digest = hashlib.sha256()
    for photo in photos:
        told = f"{photo.name}\0{photo.label}\0{photo.offset}\0{photo.size}\0"
        digest.update(told.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def stamp(photos: list[Photo]) -> int:
    """CRC-32 of the sizes and times of the files that hold these photos. Raises OSError if their
    tar or folder is gone."""
    crc, last = 0, ""
    for photo in photos:
        path = photo.path if photo.offset is not None else os.path.join(photo.path, photo.name)
        if path == last:
            continue  # the same tar
        last = path
        try:
            stat = os.stat(path)
            crc = zlib.crc32(struct.pack("<qq", stat.st_size, stat.st_mtime_ns), crc)
        except OSError:
            if photo.offset is not None or not os.path.exists(photo.path):
                raise
            crc = zlib.crc32(b"gone", crc)
    return crc
