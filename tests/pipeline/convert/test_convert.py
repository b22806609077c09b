"""Conversion as a user meets it: real photos in, a .beton out, and what is said when it fails."""

import errno
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_photos import DECODES, IGNORED, UNREADABLE
from PIL import Image

from ibeton.command import Failure
from ibeton.pipeline.convert import converter, journal
from ibeton.pipeline.convert.converter import (
    ConversionReport,
    ConvertOptions,
    convert,
    verify_existing,
)
from ibeton.pipeline.loaders import LOADERS
from ibeton.pipeline.store import sources
from ibeton.pipeline.store.beton import JPG, RAW, BetonReader, sidecar_path
from ibeton.pipeline.store.decode import decode_photo
from ibeton.pipeline.store.sources import open_source, read_bytes

needs_turbojpeg = pytest.mark.skipif(
    bool(LOADERS["ffcv"].problem()), reason="libturbojpeg is not installed: make ffcv"
)


def smooth(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def converted(src: Path, dst: Path, **options: object) -> tuple[BetonReader, ConversionReport]:
    report = convert(src, dst, ConvertOptions(**{"workers": 1, **options}))  # type: ignore[arg-type]
    return BetonReader(dst), report


def stored(reader: BetonReader) -> list[tuple[int, int, int, int, bytes]]:
    """All that is stored of each photo."""
    columns = (reader.labels, reader.modes, reader.widths, reader.heights)
    return [
        (*(int(column[i]) for column in columns), bytes(reader.photo_bytes(i)))  # type: ignore[misc]
        for i in range(len(reader))
    ]


def file_bytes(source: Path, without: str = "\0") -> dict[str, bytes]:
    """The photos' bytes by name, leaving out the class `without`."""
    opened = open_source(source)
    photos = [photo for photo in opened.photos if not photo.name.startswith(without)]
    return {photo.name: read_bytes(photo) for photo in photos}


# ---- what is stored ----


def test_color_jpegs_are_stored_byte_for_byte(photo_folder: Path, beton: Path) -> None:
    reader, files = BetonReader(beton), file_bytes(photo_folder)
    assert [sample[-1] for sample in stored(reader)] == list(files.values())
    assert reader.classes == ["class0", "class1", "class2", "class3"]
    assert [reader.classes[label] for label in reader.labels] == [n.split("/")[0] for n in files]
    assert set(reader.modes) == {JPG}
    for i, data in enumerate(files.values()):
        assert Image.open(io.BytesIO(data)).size == (reader.widths[i], reader.heights[i])


def test_raw_stores_the_pixels(photo_folder: Path, raw_beton: Path) -> None:
    reader, files = BetonReader(raw_beton), file_bytes(photo_folder)
    assert set(reader.modes) == {RAW}
    for i, data in enumerate(files.values()):
        np.testing.assert_array_equal(reader.pixels(i), decode_photo(data))


def test_jpg_encodes_all_anew_with_the_quality_given(photo_folder: Path, tmp_path: Path) -> None:
    files = list(file_bytes(photo_folder).values())
    fine, report = converted(photo_folder, tmp_path / "95.beton", write_mode="jpg", quality=95)
    coarse, _ = converted(photo_folder, tmp_path / "30.beton", write_mode="jpg", quality=30)
    assert report.done.counts == {"encoded": len(files)}
    assert coarse.sizes.sum() < 0.7 * fine.sizes.sum()
    for i, data in enumerate(files):
        assert bytes(fine.photo_bytes(i)) != data
        assert np.abs(fine.pixels(i).astype(int) - decode_photo(data)).mean() < 3


def test_smart_stores_large_photos_as_jpeg_and_small_ones_as_pixels(
    photo_folder: Path, tmp_path: Path
) -> None:
    reader, report = converted(
        photo_folder, tmp_path / "a.beton", write_mode="smart", smart_threshold=60_000
    )
    pixels = reader.widths.astype(int) * reader.heights * 3
    np.testing.assert_array_equal(reader.modes, np.where(pixels > 60_000, JPG, RAW))
    assert report.done.counts["encoded"] + report.done.counts["raw"] == 48
    assert min(report.done.counts.values()) > 5


@pytest.mark.parametrize("write_mode", ["keep", "raw"])
def test_max_resolution_shrinks_what_is_larger_and_nothing_else(
    photo_folder: Path, tmp_path: Path, write_mode: str
) -> None:
    files = list(file_bytes(photo_folder).values())
    reader, _ = converted(
        photo_folder, tmp_path / "a.beton", write_mode=write_mode, max_resolution=128
    )
    for i, data in enumerate(files):
        before, after = decode_photo(data), reader.pixels(i)
        longest = max(before.shape[:2])
        if longest <= 128:
            np.testing.assert_array_equal(after, before)
            continue
        assert max(after.shape[:2]) == 128
        for side in (0, 1):
            assert abs(after.shape[side] - before.shape[side] * 128 / longest) <= 0.5
        size = (after.shape[1], after.shape[0])
        expected = Image.fromarray(before).resize(size, Image.Resampling.HAMMING)
        distance = np.abs(after.astype(int) - np.asarray(expected))
        assert distance.max() == 0 if write_mode == "raw" else distance.mean() < 15


def test_a_very_thin_photo_keeps_a_pixel_of_width(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    smooth(2, 900).save(tmp_path / "src" / "thin.jpg")
    reader, _ = converted(tmp_path / "src", tmp_path / "a.beton", max_resolution=100)
    assert reader.pixels(0).shape == (100, 1, 3)


def test_a_subset_is_spread_evenly_over_the_sorted_photos(
    photo_folder: Path, beton: Path, tmp_path: Path
) -> None:
    whole = stored(BetonReader(beton))
    reader, _ = converted(photo_folder, tmp_path / "a.beton", subset=12)
    assert stored(reader) == whole[::4]
    assert len(reader.classes) == 4


def test_shuffle_stores_all_photos_in_an_order_of_the_seed(
    photo_folder: Path, beton: Path, tmp_path: Path
) -> None:
    whole = stored(BetonReader(beton))
    one, _ = converted(photo_folder, tmp_path / "1.beton", shuffle=True, seed=1)
    again, _ = converted(photo_folder, tmp_path / "again.beton", shuffle=True, seed=1)
    two, _ = converted(photo_folder, tmp_path / "2.beton", shuffle=True, seed=2)
    few, _ = converted(photo_folder, tmp_path / "few.beton", shuffle=True, seed=1, subset=10)
    assert sorted(stored(one)) == sorted(whole)
    assert whole != stored(one) == stored(again) != stored(two)
    assert stored(few) == stored(one)[:10]


# ---- sources ----


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_tars_convert_to_what_their_folder_converts_to(
    photo_folder: Path, beton: Path, tmp_path: Path
) -> None:
    files, folder = file_bytes(photo_folder), BetonReader(beton)
    classes = {}
    for name in folder.classes:
        inside = {n.split("/")[1]: data for n, data in files.items() if n.startswith(name)}
        classes[f"{name}.tar"] = pack(tmp_path / "inner.tar", inside).read_bytes()
    pack(tmp_path / "of_tars.tar", classes)
    pack(tmp_path / "plain.tar", files)
    for tar in ("of_tars.tar", "plain.tar"):
        reader, _ = converted(tmp_path / tar, tmp_path / f"{tar}.beton", workers=2)
        assert stored(reader) == stored(folder)
        assert reader.classes == folder.classes


def test_a_folder_without_classes_is_unlabeled_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for i in range(3):
        smooth(seed=i).save(tmp_path / "src" / f"{i}.JPG")
    reader, report = converted(tmp_path / "src", tmp_path / "a.beton")
    assert reader.labels.tolist() == [-1, -1, -1]
    assert report.done.unlabeled == 3
    assert "stored without a label: 3" in "\n".join(report.lines())


# ---- hard photos ----


def hard_set(root: Path) -> None:
    """One of each kind that real collections hold, in class folders named by what is owed."""

    def jpeg(image: Image.Image, **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, "JPEG", **options)
        return file.getvalue()

    for name in ("kept", "encoded", "unreadable"):
        (root / name).mkdir(parents=True)
    photo, exif = smooth(), Image.Exif()
    exif[0x0112] = 6
    kept = {
        "plain.jpg": jpeg(photo),
        "progressive.JPG": jpeg(photo, progressive=True),
        "full_chroma.jpeg": jpeg(photo, subsampling=0),
        "turned.jpg": jpeg(photo, exif=exif),
        "jpeg_named.png": jpeg(photo),
        "one_pixel.jpg": jpeg(smooth(1, 1)),
        "trailing.jpg": jpeg(photo) + b"\0" * 50,
        "gray.jpg": jpeg(photo.convert("L")),
    }
    for name, data in kept.items():
        (root / "kept" / name).write_bytes(data)
    (root / "kept" / ".hidden.jpg").write_bytes(jpeg(photo))
    encoded = root / "encoded"
    photo.convert("CMYK").save(encoded / "cmyk.jpg")
    photo.save(encoded / "png_named.JPEG", "PNG")
    photo.convert("RGBA").save(encoded / "rgba.png")
    photo.quantize(16).save(encoded / "palette.png")
    photo.quantize(16).save(encoded / "long_comment.gif", comment=b"x" * 70_000)
    photo.save(encoded / "photo.bmp")
    photo.save(encoded / "photo.webp")
    ramp = np.linspace(0, 65535, 2400).astype(np.uint16).reshape(40, 60)
    Image.fromarray(ramp).save(encoded / "gray16.png")
    unreadable = {
        "truncated.jpg": jpeg(photo)[:-60],
        "header.jpg": jpeg(photo)[:100],
        "empty.jpg": b"",
        "text.jpg": b"<html>404 Not Found</html>",
    }
    for name, data in unreadable.items():
        (root / "unreadable" / name).write_bytes(data)
    (root / "unreadable" / "gone.jpg").symlink_to("nowhere.jpg")


def test_hard_photos_are_kept_encoded_or_named_with_the_reason(tmp_path: Path) -> None:
    hard_set(tmp_path / "src")
    reader, report = converted(tmp_path / "src", tmp_path / "a.beton", verify=True)
    files = file_bytes(tmp_path / "src", without="unreadable/")
    assert report.done.counts == {"kept": 8, "encoded": 8}
    assert len(reader) == report.photos == len(files) == 16
    for i, (name, data) in enumerate(files.items()):
        assert reader.classes[reader.labels[i]] == name.split("/")[0]
        if name.startswith("kept"):
            assert bytes(reader.photo_bytes(i)) == data, name
        else:
            kept_jpeg = Image.open(io.BytesIO(reader.photo_bytes(i)))
            assert (kept_jpeg.format, kept_jpeg.mode) == ("JPEG", "RGB"), name
            assert np.abs(reader.pixels(i).astype(int) - decode_photo(data)).mean() < 9, name
    reasons = dict(report.done.unreadable)
    assert list(reasons) == [
        f"unreadable/{name}.jpg" for name in ("empty", "gone", "header", "text", "truncated")
    ]
    assert reasons["unreadable/empty.jpg"] == "the file is empty"
    assert reasons["unreadable/gone.jpg"] == "No such file or directory"
    assert "not an image format" in reasons["unreadable/text.jpg"]
    assert "truncated" in reasons["unreadable/truncated.jpg"]
    beside = json.loads(sidecar_path(tmp_path / "a.beton").read_text())
    assert beside["unreadable"] == [list(pair) for pair in report.done.unreadable]
    assert (beside["photos"], beside["counts"]) == (16, report.done.counts)
    assert "5 unreadable, all listed in" in "\n".join(report.lines())


def test_corner_cases_are_converted_or_named(
    hard: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, owed = hard
    reader, report = converted(folder, tmp_path / "a.beton", workers=2)
    reasons = dict(report.done.unreadable)
    stored_names = [p.name for p in open_source(folder).photos if p.name not in reasons]
    assert len(stored_names) == len(reader) == report.photos
    for name, expect in owed.items():
        if expect == IGNORED:
            assert name not in reasons
            assert name not in stored_names
        elif expect == UNREADABLE:
            assert reasons[name], name
        elif expect == DECODES:
            pixels = reader.pixels(stored_names.index(name))
            expected = decode_photo((folder / name).read_bytes())
            distance = np.abs(pixels.astype(np.int16) - expected)
            assert distance.mean() < 12, name  # palette.png is dithered
        else:
            assert name in stored_names or reasons[name]
    assert reader.pixels(stored_names.index("exif_rotated.jpg")).shape == (240, 320, 3)


def test_photo_names_need_not_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    smooth().save(tmp_path / "src" / "a.jpg")
    (tmp_path / "src" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    _, report = converted(tmp_path / "src", tmp_path / "a.beton")
    shown = "\n".join(report.lines()).encode("utf-8")
    assert b"caf\\udce9.jpg: the file is empty" in shown
    beside = json.loads(sidecar_path(tmp_path / "a.beton").read_text())
    assert os.fsencode(beside["unreadable"][0][0]) == b"caf\xe9.jpg"


# ---- the file as a whole ----


def test_one_and_two_workers_write_the_same_bytes(tmp_path: Path) -> None:
    hard_set(tmp_path / "src")
    for i in range(40):  # more than the two workers have under way at once
        smooth(50 + i, 90 - i, seed=i).save(tmp_path / "src" / "kept" / f"{i}.png")
    for workers in (1, 2):
        (tmp_path / f"{workers}").mkdir()
        converted(tmp_path / "src", tmp_path / f"{workers}" / "a.beton", workers=workers)
    for name in ("a.beton", "a.beton.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_only_the_file_and_its_json_are_left(photo_folder: Path, tmp_path: Path) -> None:
    converted(photo_folder, tmp_path / "a.beton", subset=5, verify=True)
    assert sorted(os.listdir(tmp_path)) == ["a.beton", "a.beton.json"]


def test_an_existing_file_is_replaced_on_request_only(photo_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    converted(photo_folder, path, subset=5)
    with pytest.raises(FileExistsError, match="--overwrite replaces it"):
        converted(photo_folder, path, subset=6)
    assert len(BetonReader(path)) == 5
    reader, _ = converted(photo_folder, path, subset=6, overwrite=True)
    assert len(reader) == 6


def test_a_failed_conversion_leaves_the_old_file_alone(photo_folder: Path, tmp_path: Path) -> None:
    path, broken = tmp_path / "a.beton", tmp_path / "broken"
    converted(photo_folder, path, subset=5)
    broken.mkdir()
    (broken / "a.jpg").write_bytes(b"text")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(ValueError, match="none of 1 photos is readable"):
        converted(broken, path, overwrite=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


# ---- reading back ----


def flipped(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


@pytest.fixture
def copied(beton: Path, tmp_path: Path) -> Path:
    for path in (beton, sidecar_path(beton)):
        shutil.copy(path, tmp_path / path.name)
    return tmp_path / beton.name


def test_a_whole_file_verifies(copied: Path) -> None:
    assert verify_existing(str(copied), 1) == ([], f"{copied}: every photo reads as written")


@pytest.mark.parametrize("part", [0.02, 0.5, 0.98])
def test_one_flipped_byte_of_a_photo_is_found(copied: Path, part: float) -> None:
    reader = BetonReader(copied)
    whole, photo = copied.read_bytes(), bytes(reader.photo_bytes(17))
    flipped(copied, whole.index(photo) + int(len(photo) * part))
    faults, _ = verify_existing(str(copied), 1)
    assert f"{copied}: photos 0 to 47 are not as they were written" in faults


@pytest.mark.parametrize("column", ["labels", "widths"])
def test_one_flipped_byte_of_the_metadata_is_found(copied: Path, column: str) -> None:
    sample = 24 + 2 * 1041 + 24 * 17  # header, two fields, 17 samples
    flipped(copied, sample + {"labels": 16, "widths": 1}[column])
    assert verify_existing(str(copied), 1)[0]


def test_a_file_without_checksums_is_decoded_and_said_to_be(copied: Path) -> None:
    sidecar_path(copied).unlink()
    faults, good = verify_existing(str(copied), 1)
    assert faults == []
    assert "no checksums beside it" in good
    reader = BetonReader(copied)
    middle = copied.read_bytes().index(bytes(reader.photo_bytes(3)))
    flipped(copied, middle)  # its first byte: no JPEG any more
    faults, _ = verify_existing(str(copied), 1)
    assert len(faults) == 1
    assert faults[0].startswith(f"photo 3 of {copied}: not an image format")


# ---- options ----


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quality": 0}, "--quality 0: expected 1 to 100"),
        ({"quality": 101}, "--quality 101: expected 1 to 100"),
        ({"max_resolution": -1}, "--max-resolution -1 must be at least 0"),
        ({"workers": -2}, "--workers -2 must be at least 0"),
        ({"subset": 49}, "--subset 49: .* has 48 photos"),
        ({"write_mode": "png"}, "--write-mode png: expected one of keep, jpg, raw, smart"),
        ({"write_mode": "smart"}, "--smart-threshold BYTES go together"),
        ({"smart_threshold": 5}, "--smart-threshold BYTES go together"),
    ],
)
def test_options_that_cannot_work_are_named(
    photo_folder: Path, tmp_path: Path, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        converted(photo_folder, tmp_path / "a.beton", **options)
    assert os.listdir(tmp_path) == []


# ---- what must not be trusted ----


def jpeg_of(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@needs_turbojpeg
def test_verify_leaves_out_a_photo_that_was_cut_and_given_an_end_marker(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for i in range(4):
        (tmp_path / "src" / f"{i}.jpg").write_bytes(jpeg_of(smooth(seed=i)))
    whole = jpeg_of(smooth(200, 200))
    (tmp_path / "src" / "cut.jpg").write_bytes(whole[: len(whole) * 3 // 4] + b"\xff\xd9")
    reader, report = converted(tmp_path / "src", tmp_path / "a.beton", verify=True)
    assert len(reader) == 4
    assert [name for name, _ in report.done.unreadable] == ["cut.jpg"]
    assert "end early" in report.done.unreadable[0][1]
    converted(tmp_path / "src", tmp_path / "b.beton")
    faults, _ = verify_existing(str(tmp_path / "b.beton"), workers=1)
    assert len(faults) == 1
    assert "end early" in faults[0]


@pytest.mark.parametrize("mode", ["keep", "jpg"])
def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded(
    tmp_path: Path, mode: str
) -> None:
    data = jpeg_of(smooth(), progressive=True)
    last = data.rindex(b"\xff\xda")
    many = data[:last] + data[last:-2] * 2000 + data[-2:]
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "many.jpg").write_bytes(many)
    (tmp_path / "src" / "usual.jpg").write_bytes(data)
    _, report = converted(tmp_path / "src", tmp_path / "a.beton", write_mode=mode)
    ((name, reason),) = report.done.unreadable
    assert name == "many.jpg"
    assert re.fullmatch(r"a JPEG of 2,\d\d\d scans, the limit is 100", reason)


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
@pytest.mark.parametrize("name", [".a.beton.partial", ".a.beton.journal"])
def test_links_at_the_temporary_names_are_refused_and_not_written_through(
    photo_folder: Path, tmp_path: Path, kind: str, name: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    if kind == "symbolic":
        (tmp_path / name).symlink_to(victim)
    else:
        os.link(victim, tmp_path / name)
    with pytest.raises(FileExistsError, match=rf"{name} is a .*link.*; remove it"):
        convert(photo_folder, tmp_path / "a.beton", ConvertOptions(workers=1))
    assert victim.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == sorted([name, "victim"]), "the link is the user's"


def test_a_resolution_that_cannot_be_meant_is_refused(photo_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--max-resolution 1: expected 0"):
        convert(photo_folder, tmp_path / "a.beton", ConvertOptions(max_resolution=1))


def test_the_report_tells_what_was_skipped(photo_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(photo_folder, tmp_path / "src")
    (tmp_path / "src" / "class0" / "a.heic").write_bytes(b"")
    report = convert(tmp_path / "src", tmp_path / "a.beton", ConvertOptions(workers=1))
    assert "skipped 1 that are not photos: 1 .heic" in "\n".join(report.lines())


# ---- a source that goes away ----


def test_a_tar_that_goes_away_ends_the_conversion_which_can_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, photo = tmp_path / "photos.tar", io.BytesIO()
    smooth().save(photo, "JPEG")
    with tarfile.open(path, "w") as tar:
        for i in range(40):
            member = tarfile.TarInfo(f"x/{i:02d}.jpg")
            member.size = len(photo.getvalue())
            tar.addfile(member, io.BytesIO(photo.getvalue()))
    monkeypatch.setattr(journal, "MARK_EVERY_S", 0.0)
    append = converter._append

    appended: list[Any] = []

    def gone(*arguments: Any) -> None:
        append(*arguments)
        appended.append(arguments)
        if len(appended) == 20:
            path.rename(tmp_path / "away.tar")

    monkeypatch.setattr(converter, "_append", gone)
    monkeypatch.setattr(journal.Journal, "tick", waiting(journal.Journal.tick))
    options = ConvertOptions(workers=1)
    with pytest.raises(Failure, match=r"photos\.tar: No such file"):
        convert(path, tmp_path / "a.beton", options)
    assert not (tmp_path / "a.beton").exists()
    (tmp_path / "away.tar").rename(path)
    monkeypatch.setattr(converter, "_append", append)
    resumed = convert(path, tmp_path / "a.beton", options)
    assert (resumed.photos, resumed.before) == (40, 19)


def waiting(tick: Any) -> Any:
    """A mark is on the disk before the next photo."""

    def tick_and_wait(journal: Any, *arguments: Any) -> None:
        tick(journal, *arguments)
        if journal._pending:
            journal._pending.result()

    return tick_and_wait


def test_a_folder_that_goes_away_ends_the_conversion_which_can_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, away = tmp_path / "photos", tmp_path / "away"
    folder.mkdir()
    smooth().save(folder / "000.jpg")
    for i in range(1, 300):
        os.link(folder / "000.jpg", folder / f"{i:03d}.jpg")
    monkeypatch.setattr(journal, "MARK_EVERY_S", 0.0)
    monkeypatch.setattr(journal.Journal, "tick", waiting(journal.Journal.tick))
    append, appended = converter._append, []

    def gone(*arguments: Any) -> None:
        append(*arguments)
        appended.append(arguments)
        if len(appended) == 20:
            folder.rename(away)

    monkeypatch.setattr(converter, "_append", gone)
    options = ConvertOptions(workers=1)
    with pytest.raises(Failure, match="No such file"):
        convert(folder, tmp_path / "a.beton", options)
    away.rename(folder)
    monkeypatch.setattr(converter, "_append", append)
    resumed = convert(folder, tmp_path / "a.beton", options)
    assert (resumed.photos, resumed.before) == (300, 19)
    assert resumed.done.unreadable == []


@pytest.fixture
def forty(tmp_path: Path) -> tuple[Path, bytes]:
    """A folder of 40 photos, and the bytes of its .beton."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(40):
        smooth(60 + i, 40, seed=i).save(folder / f"{i:02d}.jpg")
    convert(folder, tmp_path / "whole.beton", ConvertOptions(workers=1))
    return folder, (tmp_path / "whole.beton").read_bytes()


def failing_open(number: int, fails: Callable[[str], bool]) -> Callable[..., Any]:
    """`open`, but with that error for the names that are to fail."""

    def opens(path: str, mode: str) -> Any:
        if fails(os.path.basename(path)):
            raise OSError(number, os.strerror(number), path)
        return open(path, mode)

    return opens


def test_photos_that_could_not_be_read_for_a_moment_are_in_their_place(
    forty: tuple[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole = forty
    to_fail = {f"{i:02d}.jpg" for i in range(15, 30)}

    def fails(name: str) -> bool:
        once = name in to_fail
        to_fail.discard(name)
        return once

    monkeypatch.setattr(sources, "open", failing_open(errno.EIO, fails), raising=False)
    report = convert(folder, tmp_path / "a.beton", ConvertOptions(workers=1))
    assert not to_fail
    assert report.done.unreadable == []
    assert (tmp_path / "a.beton").read_bytes() == whole


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT, errno.ESTALE, errno.ETIMEDOUT])
def test_a_server_that_goes_away_costs_no_photo(
    forty: tuple[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder, whole = forty
    away: list[str] = []

    def fails(name: str) -> bool:
        if name == "20.jpg":
            away.append(name)
        return bool(away)

    monkeypatch.setattr(journal, "MARK_EVERY_S", 0.0)
    monkeypatch.setattr(journal.Journal, "tick", waiting(journal.Journal.tick))
    with monkeypatch.context() as patch:
        patch.setattr(sources, "open", failing_open(number, fails), raising=False)
        with pytest.raises((Failure, OSError), match=os.strerror(number)):
            convert(folder, tmp_path / "a.beton", ConvertOptions(workers=1))
    resumed = convert(folder, tmp_path / "a.beton", ConvertOptions(workers=1))
    assert resumed.before >= 16  # whole jobs
    assert resumed.done.unreadable == []
    assert (tmp_path / "a.beton").read_bytes() == whole


def test_many_files_in_a_row_that_cannot_be_read_are_listed_if_the_folder_is_there(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("0.jpg", "9.jpg"):
        smooth().save(folder / name)
    for i in range(250):
        (folder / f"1-{i}.jpg").symlink_to(tmp_path / "annexed" / f"{i}.jpg")
    report = convert(folder, tmp_path / "a.beton", ConvertOptions(workers=1))
    assert (report.photos, len(report.done.unreadable)) == (2, 250)
