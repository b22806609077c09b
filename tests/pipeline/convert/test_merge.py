"""Shards merged are what one conversion writes; what does not belong together is named."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

from ibeton.pipeline.convert import stored
from ibeton.pipeline.convert.converter import ConvertOptions, convert
from ibeton.pipeline.convert.merge import merge
from ibeton.pipeline.store.beton import BetonReader, sidecar_path

SHARDS = 3


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 photos (three blocks of checksums) in five classes, some loose, gray or unreadable."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(600):
        folder = root if i % 100 == 3 else root / f"class{i % 5}"
        folder.mkdir(exist_ok=True)
        coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        photo = Image.fromarray(coarse).resize((30 + i % 40, 50 - i % 30))
        path = folder / f"{i:03d}.jpg"
        (photo.convert("L") if i % 50 == 7 else photo).save(path)
        if i % 60 == 11:
            path.write_bytes(path.read_bytes()[:-30])
    return root


@pytest.fixture(scope="module")
def made(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole.beton`, and `1.beton` to `3.beton`, the shards of the same conversion."""
    folder = tmp_path_factory.mktemp("made")
    convert(photos, folder / "whole.beton", ConvertOptions(workers=1))
    for i in range(1, SHARDS + 1):
        options = ConvertOptions(workers=1, shard=f"{i}/{SHARDS}")
        convert(photos, folder / f"{i}.beton", options)
    return folder


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> list[Path]:
    """Copies of the shards, to be damaged."""
    for path in made.glob("[1-9].beton*"):
        shutil.copy(path, tmp_path / path.name)
    return sorted(tmp_path.glob("*.beton"))


def test_merged_shards_are_byte_for_byte_one_conversion(
    made: Path, shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [len(BetonReader(path)) for path in shards] == [194, 196, 200]
    monkeypatch.setattr(Image, "open", None)  # nothing is decoded
    out = tmp_path / "out.beton"
    assert merge([shards[2], shards[0], shards[1]], out) == 590
    assert out.read_bytes() == (made / "whole.beton").read_bytes()
    assert sidecar_path(out).read_bytes() == sidecar_path(made / "whole.beton").read_bytes()


def test_a_shuffled_conversion_in_one_shard_and_in_four(photos: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"shuffle": True, "subset": 50, "write_mode": "raw", "workers": 1}
    convert(photos, tmp_path / "whole.beton", ConvertOptions(**settings))
    paths = [tmp_path / f"{i}.beton" for i in range(1, 5)]
    for i, path in enumerate(paths, 1):
        convert(photos, path, ConvertOptions(**settings, shard=f"{i}/4"))
    merge([*paths], tmp_path / "out.beton")
    assert (tmp_path / "out.beton").read_bytes() == (tmp_path / "whole.beton").read_bytes()
    convert(photos, tmp_path / "alone.beton", ConvertOptions(**settings, shard="1/1"))
    merge([tmp_path / "alone.beton"], tmp_path / "again.beton")
    assert (tmp_path / "again.beton").read_bytes() == (tmp_path / "whole.beton").read_bytes()


def test_a_shard_without_a_readable_photo_is_merged_too(photos: Path, tmp_path: Path) -> None:
    folder, shards = tmp_path / "photos", [tmp_path / f"{i}.beton" for i in (1, 2, 3)]
    folder.mkdir()
    for i in range(6):
        shutil.copy(photos / "class0" / "000.jpg", folder / f"{i}.jpg")
    for i in (2, 3):
        (folder / f"{i}.jpg").write_bytes(b"text")
    convert(folder, tmp_path / "whole.beton", ConvertOptions(workers=1))
    for i, path in enumerate(shards, 1):
        convert(folder, path, ConvertOptions(workers=1, shard=f"{i}/3", verify=True))
    assert [len(BetonReader(path)) for path in shards] == [2, 0, 2]
    merge([*shards], tmp_path / "out.beton")
    for name in ("{}.beton", "{}.beton.json"):
        merged, whole = (tmp_path / name.format(which) for which in ("out", "whole"))
        assert merged.read_bytes() == whole.read_bytes()


def test_shards_without_any_readable_photo_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"text")
    report = convert(tmp_path / "photos", tmp_path / "1.beton", ConvertOptions(shard="1/1"))
    assert "0 photos (none readable)" in report.lines()[0]
    refused([tmp_path / "1.beton"], "none of 1 shards holds a readable photo")


def refused(paths: list[Path], reason: str) -> None:
    """The merge fails with that sentence and leaves nothing behind."""
    folder = paths[0].parent
    before = sorted(os.listdir(folder))
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        merge([*paths], folder / "out.beton")
    assert sorted(os.listdir(folder)) == before


def test_missing_and_repeated_shards_are_named(shards: list[Path]) -> None:
    refused(shards[:2], r"1 of 3 shards are missing: --shard 3/3; convert and give them too")
    refused(shards[1:2], r"2 of 3 shards are missing: --shard 1/3, 3/3;")
    refused([*shards, shards[0]], r"/1\.beton and .*/1\.beton are both shard 1 of 3")
    refused([shards[0], shards[0].with_name("no.beton")], r"no\.beton does not exist")


def test_a_shard_with_a_flipped_byte_is_named_with_the_photos(shards: list[Path]) -> None:
    photo = bytes(BetonReader(shards[1]).photo_bytes(100))
    content = bytearray(shards[1].read_bytes())
    content[content.index(photo) + len(photo) // 2] ^= 4
    shards[1].write_bytes(content)
    refused(
        shards,
        r"/2\.beton is damaged: photos 0 to 195 are not as they were written; convert it anew"
        r" \(--shard 2/3\)",
    )


def test_a_cut_shard_is_named(shards: list[Path]) -> None:
    os.truncate(shards[2], shards[2].stat().st_size - 1000)
    refused(shards, r"/3\.beton is cut short")


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    beside = sidecar_path(path)
    content = json.loads(beside.read_text())
    change(content)
    beside.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda c: c["classes"].append("zebra"),
            r"/2\.beton has other classes than .*/1\.beton: zebra is a class of one of them only",
        ),
        (lambda c: c["classes"].reverse(), "has other classes .*: their order is different"),
        (lambda c: c.update(listing="00"), r"/2\.beton has a listing of other photos than"),
        (lambda c: c["options"].update(quality=5), "other options .*: quality is 5, not 90"),
        (lambda c: c["options"].update(shard="2/4"), r"/2\.beton is one of 4 shards, .* one of 3"),
        (
            lambda c: c["options"].update(shard=""),
            r"/2\.beton is not a shard: it was converted with",
        ),
        (lambda c: c.pop("options"), r"/2\.beton is not a shard: it was converted without"),
        (lambda c: c.update(photos=195), r"holds 196 photos, but its JSON says 195"),
        (lambda c: c["checksums"].update(samples=9), r"its checksums are of another version"),
    ],
)
def test_what_does_not_belong_together_is_named(
    shards: list[Path], change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    edited(shards[1], change)
    refused(shards, reason)


def test_a_file_without_its_json_is_no_shard(shards: list[Path]) -> None:
    sidecar_path(shards[0]).unlink()
    refused(shards, r"/1\.beton is not a shard: it has no JSON beside it; make it with")


def test_labels_outside_the_classes_are_named(shards: list[Path]) -> None:
    for path in shards:
        edited(path, lambda content: content["classes"].pop())
    refused(shards, r"/\d\.beton has labels outside its 4 classes")


@pytest.mark.parametrize("shard", ["3", "0/3", "4/3", "a/b", "1/0", "-1/2"])
def test_a_shard_that_is_no_part_is_refused(photos: Path, tmp_path: Path, shard: str) -> None:
    with pytest.raises(ValueError, match=f"--shard {shard}: expected I/N"):
        convert(photos, tmp_path / "a.beton", ConvertOptions(shard=shard))
    with pytest.raises(ValueError, match="--shard 1/9: there are 5 photos to store"):
        convert(photos, tmp_path / "a.beton", ConvertOptions(shard="1/9", subset=5))


def test_the_command_says_what_it_wrote_or_why_not(shards: list[Path], tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ibeton.pipeline.convert.merge", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    out = tmp_path / "out.beton"
    done = run(*shards, out)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{out}: 590 photos of 3 shards, ")
    done = run(*shards, out)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {out} exists; --overwrite replaces it\n"
    done = run(*shards, shards[0], "--overwrite")
    assert (done.returncode, done.stdout) == (2, "")
    assert "is one of the shards; give another name" in done.stderr
    assert len(BetonReader(shards[0])) == 194


# ---- how the shards themselves come about ----


def test_usual_photos_are_kept_without_a_decode(
    photo_folder: Path, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(data: bytes) -> Image.Image:
        raise AssertionError("a photo was decoded")

    monkeypatch.setattr(stored, "load_photo", never)
    report = convert(photo_folder, tmp_path / "photos.beton", ConvertOptions(workers=2))
    assert report.done.counts == {"kept": 48}
    assert (tmp_path / "photos.beton").read_bytes() == beton.read_bytes()
