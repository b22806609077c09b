"""The .beton format, held against FFCV's own loader and writer, and what a damaged file says."""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ibeton.pipeline.convert.converter import ConvertOptions, convert
from ibeton.pipeline.store.beton import (
    ALLOCATION,
    FIELD,
    FIRST_PAGE,
    HEADER,
    JPG,
    RAW,
    SAMPLE,
    BetonReader,
    sidecar_path,
)
from ibeton.pipeline.store.beton_writer import BetonWriter
from ibeton.pipeline.store.decode import UnreadablePhoto

CONSTANT = 24  # photos of one size, for FFCV's plain decoder


def need_ffcv() -> Any:
    return pytest.importorskip("ffcv", reason="ffcv is not installed: make ffcv")


def pixels_of(number: int, width: int = 32, height: int = 24) -> np.ndarray:
    coarse = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


@pytest.fixture(scope="module")
def constant_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of one size in three classes, one loose: its label is -1."""
    root = tmp_path_factory.mktemp("constant")
    for i in range(CONSTANT):
        folder = root if i == 0 else root / f"class{i % 3}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels_of(i)).save(folder / f"{i:02d}.jpg", quality=92)
    return root


def written(path: Path, *photos: bytes) -> BetonReader:
    """A file of raw photos 100 pixels wide, labeled by their number."""
    with BetonWriter(path, len(photos)) as writer:
        for label, data in enumerate(photos):
            writer.append(label, RAW, 100, len(data) // 300, data)
        writer.seal()
        writer.publish({})
    return BetonReader(path)


# ---- FFCV's loader reads what is written here ----


def loaded(path: Path, decoder: Any, order: str, os_cache: bool) -> dict[int, np.ndarray]:
    """Label and pixels of every sample that FFCV's stock loader yields, by its number.

    FFCV does not tell which sample it yields, so its order is noted as it is drawn.
    """
    from ffcv.fields.decoders import IntDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    loader = Loader(
        str(path),
        batch_size=5,  # does not divide the sets: the last batch is short
        num_workers=1,
        order=OrderOption[order],
        os_cache=os_cache,
        drop_last=False,
        seed=4,
        pipelines={"image": [decoder], "label": [IntDecoder(), ToTensor()]},
    )
    numbers: list[int] = []
    draw_order = loader.next_traversal_order

    def noted_order() -> Any:
        drawn = draw_order()
        numbers[:] = [int(i) for i in drawn]
        return drawn

    loader.next_traversal_order = noted_order
    pixels, labels = [], []
    for image, label in loader:
        pixels += [np.array(one) for one in image]
        labels += label[:, 0].tolist()
    reader = BetonReader(path)
    assert sorted(numbers) == list(range(len(reader)))
    assert order == "SEQUENTIAL" or numbers != sorted(numbers)
    assert labels == [int(reader.labels[i]) for i in numbers]
    return dict(zip(numbers, pixels, strict=True))


ORDERS = ["SEQUENTIAL", "RANDOM", pytest.param("QUASI_RANDOM", marks=pytest.mark.slow)]


@pytest.mark.parametrize("os_cache", [True, False], ids=["os_cache", "process_cache"])
@pytest.mark.parametrize("order", ORDERS)
def test_ffcv_loads_every_raw_photo_exactly(
    constant_folder: Path, tmp_path: Path, order: str, os_cache: bool
) -> None:
    need_ffcv()
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder

    path = tmp_path / "raw.beton"
    convert(constant_folder, path, ConvertOptions(write_mode="raw", workers=1))
    reader = BetonReader(path)
    assert set(reader.labels) == {-1, 0, 1, 2}
    for i, pixels in loaded(path, SimpleRGBImageDecoder(), order, os_cache).items():
        np.testing.assert_array_equal(pixels, reader.pixels(i))


@pytest.mark.parametrize("write_mode", ["keep", "jpg"])
def test_ffcv_decodes_every_jpeg_photo(
    constant_folder: Path, tmp_path: Path, write_mode: str
) -> None:
    need_ffcv()
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder

    path = tmp_path / "jpg.beton"
    convert(constant_folder, path, ConvertOptions(write_mode=write_mode, workers=1))
    reader = BetonReader(path)
    for i, pixels in loaded(path, SimpleRGBImageDecoder(), "RANDOM", True).items():
        distance = np.abs(pixels.astype(int) - reader.pixels(i))  # two builds of libjpeg
        assert distance.max() <= 8
        assert distance.mean() <= 2


@pytest.mark.parametrize("os_cache", [True, False], ids=["os_cache", "process_cache"])
def test_ffcv_crops_photos_of_all_sizes(beton: Path, os_cache: bool) -> None:
    need_ffcv()
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder

    reader = BetonReader(beton)
    decoder = CenterCropRGBImageDecoder((32, 32), ratio=1)
    for i, crop in loaded(beton, decoder, "QUASI_RANDOM", os_cache).items():
        photo = reader.pixels(i)
        side = min(photo.shape[:2])
        top, left = (photo.shape[0] - side) // 2, (photo.shape[1] - side) // 2
        square = Image.fromarray(photo[top : top + side, left : left + side])
        expected = np.asarray(square.resize((32, 32), Image.Resampling.BOX)).astype(int)
        assert np.abs(crop - expected).mean() < 5  # another photo is 40 and more away


def test_ffcv_reads_photos_of_several_pages_that_grow(tmp_path: Path) -> None:
    """Pages grow from 8 to 16 MiB in mid-file, where the first photos already lie in theirs."""
    need_ffcv()
    from ffcv.loader import Loader, OrderOption

    rng = np.random.default_rng(0)
    path = tmp_path / "pages.beton"
    sizes = [5_000_000, 5_000_000, 1_000_000, 9_000_000, 300, 7_000_000, 8_000_000]
    reader = written(path, *(rng.bytes(size // 300 * 300) for size in sizes))
    assert reader.page_size == 2 * FIRST_PAGE
    loader = Loader(
        str(path), 1, 1, os_cache=False, order=OrderOption.QUASI_RANDOM, pipelines={"image": None}
    )
    assert sorted(int(label) for (label,) in loader) == list(range(len(sizes)))
    manager = loader.memory_manager
    memory = manager.schedule_epoch([[i] for i in range(len(sizes))])
    memory.__enter__()
    read = manager.compile_reader()
    pointers = loader.reader.metadata["f0"]["data_ptr"]
    for i in range(len(sizes)):
        memory.start_batch(i)
        assert bytes(read(pointers[i], memory.state)) == bytes(reader.photo_bytes(i))
    memory.__exit__(None, None, None)


# ---- the reader here reads what FFCV's writer writes ----


class Photos:
    """An indexable data set, as FFCV's writer wants it."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return pixels_of(i, 40 + i, 60 - i), i % 5 - 1


@pytest.mark.parametrize("write_mode", ["raw", "jpg"])
def test_ffcvs_own_files_open_with_the_same_bytes(tmp_path: Path, write_mode: str) -> None:
    need_ffcv()
    from ffcv.fields import IntField, RGBImageField
    from ffcv.reader import Reader
    from ffcv.writer import DatasetWriter

    path = tmp_path / "theirs.beton"
    fields = {"image": RGBImageField(write_mode=write_mode), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=2).from_indexed_dataset(Photos(), chunksize=4)
    ours, theirs = BetonReader(path), Reader(str(path))
    assert len(ours) == 30
    assert ours.classes == []
    np.testing.assert_array_equal(ours.labels, np.arange(30) % 5 - 1)
    np.testing.assert_array_equal(ours.widths, 40 + np.arange(30))
    np.testing.assert_array_equal(ours.heights, 60 - np.arange(30))
    assert set(ours.modes) == {RAW if write_mode == "raw" else JPG}
    content = path.read_bytes()
    table = {int(row["sample_id"]): row for row in theirs.alloc_table}
    for i in range(30):
        begin, size = int(table[i]["ptr"]), int(table[i]["size"])
        assert bytes(ours.photo_bytes(i)) == content[begin : begin + size]
        distance = np.abs(ours.pixels(i).astype(int) - pixels_of(i, 40 + i, 60 - i))
        assert distance.max() == 0 if write_mode == "raw" else distance.mean() < 5


# ---- writer ----


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    one, two = pixels_of(1, 5, 7), pixels_of(2, 300, 2)
    with BetonWriter(path, 5) as writer:  # three turned out unreadable
        writer.append(-1, RAW, 5, 7, one.tobytes())
        writer.append(2**40, RAW, 300, 2, two.tobytes())
        assert not path.exists()
        writer.seal()
        assert not path.exists()
        writer.publish({"classes": ["cat", "hund é"]})
    reader = BetonReader(path)
    assert len(reader) == 2
    assert reader.labels.tolist() == [-1, 2**40]
    assert reader.classes == ["cat", "hund é"]
    np.testing.assert_array_equal(reader.pixels(0), one)
    np.testing.assert_array_equal(reader.pixels(1), two)
    assert reader.sizes.tolist() == [one.size, two.size]
    assert reader.name(1) == f"photo 1 of {path}"
    assert sorted(os.listdir(tmp_path)) == ["a.beton", "a.beton.json"]


def test_both_files_are_on_the_disk_before_their_names_and_those_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave an empty JSON, or no name at all."""
    path = tmp_path / "a.beton"
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def flush(file: int) -> None:
        fsync(file)
        events.append(("flushed", os.readlink(f"/proc/self/fd/{file}")))

    def rename(old: Path, new: Path) -> None:
        assert ("flushed", str(old)) in events
        replace(old, new)
        events.append(("named", str(new)))

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    written(path, bytes(300))
    assert events[-3:] == [
        ("named", str(path)),
        ("named", str(sidecar_path(path))),
        ("flushed", str(tmp_path)),
    ]


def test_a_writer_that_is_left_early_leaves_nothing(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "a.beton", 1) as writer:
        writer.append(0, RAW, 1, 1, b"rgb")
        assert len(os.listdir(tmp_path)) == 1
    assert os.listdir(tmp_path) == []
    with BetonWriter(tmp_path / "a.beton", 1) as writer:
        writer.append(0, RAW, 1, 1, b"rgb")
        assert writer.seal().exists()
    assert os.listdir(tmp_path) == []


def test_what_a_killed_writer_left_is_removed_and_that_of_a_living_one_is_not(
    tmp_path: Path,
) -> None:
    names = [".a.beton.1.partial", ".a.beton.2.partial", ".a.beton.3.beton.partial"]
    left, living, other = (tmp_path / name for name in names)
    fresh = tmp_path / ".a.beton.4.partial"
    for path in (left, living, other, fresh):
        path.touch()
    for path in (left, living, other):
        os.utime(path, (1, 1))
    with open(living, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with BetonWriter(tmp_path / "a.beton", 1):
            assert [p.exists() for p in (left, living, other, fresh)] == [False, True, True, True]


def test_two_writers_of_one_file_are_told_of_each_other(tmp_path: Path) -> None:
    with (
        BetonWriter(tmp_path / "a.beton", 1),
        pytest.raises(FileExistsError, match=r"another conversion is writing a\.beton"),
    ):
        BetonWriter(tmp_path / "a.beton", 1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("mode", "width", "height", "data", "reason"),
    [
        (RAW, 0, 1, b"", "a side must be 1 to 65535"),
        (JPG, 65536, 1, b"jpeg", "a side must be 1 to 65535"),
        (RAW, 2, 2, b"rgb", "mode 1 with 3 bytes for 2 x 2"),
        (2, 1, 1, b"rgb", "mode 2"),
        (JPG, 1, 1, b"", "a photo must have 1 to"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    tmp_path: Path, mode: int, width: int, height: int, data: bytes, reason: str
) -> None:
    with (
        BetonWriter(tmp_path / "a.beton", 1) as writer,
        pytest.raises(ValueError, match=reason),
    ):
        writer.append(0, mode, width, height, data)


# ---- reader: files that are not whole, or not these ----


def refused(path: Path, content: bytes | bytearray, reason: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        BetonReader(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named_with_the_way_to_make_it(tmp_path: Path) -> None:
    for path in (tmp_path / "no.beton", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"ibeton convert"):
            BetonReader(path)


def test_files_that_are_no_beton_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "not.beton"
    refused(path, b"", "is not a .beton file: it is too small")
    refused(path, b"\x89PNG" * 10, "too small")
    refused(path, b"\x89PNG" * 5000, "its header makes no sense")
    refused(path, bytes(20_000), "its header makes no sense")


def test_other_versions_and_fields_are_refused(tmp_path: Path, beton: Path) -> None:
    path, content = tmp_path / "other.beton", bytearray(beton.read_bytes())
    header = np.frombuffer(content, HEADER, 1)
    header["version"] = 3
    refused(path, content, "of version 3, version 2 is read")
    header["version"] = 2
    fields = np.frombuffer(content, FIELD, 2, HEADER.itemsize)
    fields["name"][1] = b"covariate"
    refused(path, content, r"has the fields image \(type 2\), covariate \(type 1\); expected")
    fields["name"][1], fields["type_id"][1] = b"label", 0
    refused(path, content, r"label \(type 0\); expected image")
    fields["type_id"][1] = 1
    header["num_fields"] = 1
    refused(path, content, r"has the fields image \(type 2\); expected")
    header["num_fields"] = 60_000
    refused(path, content, "cut short inside its field list")


def test_ffcvs_files_with_other_fields_are_refused(tmp_path: Path) -> None:
    need_ffcv()
    from ffcv.fields import FloatField, RGBImageField
    from ffcv.writer import DatasetWriter

    path = tmp_path / "regression.beton"
    fields = {"photo": RGBImageField(write_mode="raw"), "value": FloatField()}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(Photos())
    with pytest.raises(ValueError, match=r"photo \(type 2\), value \(type 0\); expected image"):
        BetonReader(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, beton: Path) -> None:
    content = beton.read_bytes()
    table = int(np.frombuffer(content, HEADER, 1)["alloc_table_ptr"][0])
    for length in (30, 2500, table - 1000, table, table + 1, len(content) - 1):
        refused(tmp_path / "cut.beton", content[:length], "too small|cut short")


def test_a_file_that_ffcv_did_not_finish_is_refused(tmp_path: Path, beton: Path) -> None:
    content = bytearray(beton.read_bytes())
    np.frombuffer(content, HEADER, 1)["alloc_table_ptr"] = 0  # written last
    refused(tmp_path / "half.beton", content, "cut short or was never finished")


def in_table(content: bytearray) -> np.ndarray:
    header = np.frombuffer(content, HEADER, 1)[0]
    start, count = int(header["alloc_table_ptr"]), int(header["num_samples"])
    return np.frombuffer(content, ALLOCATION, count, start)


def in_metadata(content: bytearray) -> np.ndarray:
    count = int(np.frombuffer(content, HEADER, 1)[0]["num_samples"])
    return np.frombuffer(content, SAMPLE, count, HEADER.itemsize + 2 * FIELD.itemsize)


def _moved(content: bytearray) -> None:
    in_metadata(content)["image"]["data_ptr"][7] += 1


def _too_long(content: bytearray) -> None:
    in_table(content)["size"][7] = 2**40


def _beyond_all_numbers(content: bytearray) -> None:
    in_table(content)["size"][7] = 2**64 - 1


def _another_sample(content: bytearray) -> None:
    in_table(content)["sample_id"][7] = 8


@pytest.mark.parametrize("damage", [_moved, _too_long, _beyond_all_numbers, _another_sample])
def test_tables_that_do_not_agree_are_refused(
    tmp_path: Path, beton: Path, damage: Callable[[bytearray], None]
) -> None:
    content = bytearray(beton.read_bytes())
    damage(content)
    refused(tmp_path / "damaged.beton", content, "damaged: the data of 1 samples, the first .* 7,")


def test_a_photo_over_a_pages_edge_is_refused(tmp_path: Path) -> None:
    """Such a photo would reach FFCV's process cache cut off."""
    path = tmp_path / "edge.beton"
    written(path, *(bytes(3_000_000) for _ in range(3)))  # the third opens a second page of 8 MiB
    content = bytearray(path.read_bytes())
    np.frombuffer(content, HEADER, 1)["page_size"] = FIRST_PAGE // 4
    sidecar_path(path).unlink()
    refused(path, content, "damaged: the data of 3 samples")


def test_a_photo_of_another_size_than_noted_is_unreadable(tmp_path: Path, beton: Path) -> None:
    content = bytearray(beton.read_bytes())
    image = in_metadata(content)["image"]
    image["width"][3] += 1
    image["mode"][4] = RAW
    image["mode"][5] = 9
    path = tmp_path / "sizes.beton"
    path.write_bytes(content)
    reader = BetonReader(path)
    for index, reason in ((3, "the file says"), (4, "bytes of raw pixels"), (5, "mode 9 is nei")):
        with pytest.raises(UnreadablePhoto, match=reason):
            reader.pixels(index)
    assert reader.pixels(2).shape == (reader.heights[2], reader.widths[2], 3)


def test_the_json_of_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    written(path, bytes(300))
    beside = sidecar_path(path)
    content = json.loads(beside.read_text())
    beside.write_text(json.dumps({**content, "file_bytes": 12}))
    with pytest.raises(ValueError, match="describes a file of 12 bytes"):
        BetonReader(path)
    whole = content | {"file_bytes": path.stat().st_size}
    spoiled = [json.dumps(whole | part) for part in ({"classes": None}, {"checksums": [1]})]
    for other in ("[]", "{}", "not json", '"text"', *spoiled):
        beside.write_text(other)
        with pytest.raises(ValueError, match="is not what the converter writes; remove it"):
            BetonReader(path)
    beside.unlink()
    assert len(BetonReader(path)) == 1
