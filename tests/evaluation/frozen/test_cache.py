"""Cached features: found again only by what they came from, whole or not there at all."""

import errno
import os
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from photo_folders import COLORS, small_vit, wait_for_another_time, write_photos

from ibeton.distributed import leave_group
from ibeton.evaluation.frozen import knn
from ibeton.evaluation.frozen.cache import _new_array, cached_features
from ibeton.evaluation.frozen.features import Extraction, extract
from ibeton.evaluation.photos import PhotoSet

CONFIG = {"arch": "vit_t", "num_heads": 2}
HOW = Extraction(batch_size=4)


class Counted:
    """A cache folder, and how many images passed the backbone."""

    def __init__(self, folder, photos, backbone=None):
        self.folder, self.photos = folder, photos
        self.backbone = backbone or small_vit()
        self.images = 0
        self.backbone.register_forward_pre_hook(self.count)
        self.backbone.patch_embed.register_forward_pre_hook(self.count)

    def count(self, module, inputs):
        self.images += len(inputs[0]) if module is self.backbone.patch_embed else 0

    def get(self, *names, photos=None, config=CONFIG, how=HOW):
        self.images = 0
        photos = photos or PhotoSet(self.photos, 32)
        return cached_features(self.folder, self.backbone, config, photos, names, how)

    def computes(self, *names, **changed):
        self.get(*names, **changed)
        return self.images > 0


@pytest.fixture
def counted(tmp_path):
    return Counted(tmp_path / "cache", write_photos(tmp_path / "photos", COLORS, 3))


def assert_same(one, other, names):
    assert torch.equal(one.labels, other.labels)
    for name in names:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=0)


def test_what_is_found_again_is_what_was_computed(counted):
    names = ("blocks", "parts", "cls")
    expected = extract(small_vit(), PhotoSet(counted.photos, 32), names, HOW)
    assert_same(counted.get(*names), expected, names)
    assert counted.images == 9
    found = counted.get(*names)
    assert counted.images == 0
    assert_same(found, expected, names)
    assert isinstance(found.arrays["cls"], np.memmap)


def test_a_wider_entry_serves_a_narrower_question(counted):
    assert counted.computes("cls", "patch_mean")
    assert not counted.computes("cls")
    assert not counted.computes("patch_mean")
    assert counted.computes("cls", "blocks")


def test_anything_that_changes_features_changes_the_key(counted):
    assert counted.computes("cls")
    assert counted.computes("cls", config={**CONFIG, "num_heads": 4})
    assert counted.computes("cls", how=Extraction(precision="bf16"))
    assert counted.computes("cls", photos=PhotoSet(counted.photos, 40))
    assert not counted.computes("cls", how=Extraction(batch_size=2, threads=1))
    assert not counted.computes("cls")
    with torch.no_grad():
        counted.backbone.blocks[0].mlp.fc1.bias[3] += 1e-6
    assert counted.computes("cls")


def test_a_photo_that_is_written_anew_is_seen_even_if_its_time_is_set_back(counted):
    counted.get("cls")
    photo = counted.photos / "green" / "1.jpg"
    stat = os.stat(photo)
    wait_for_another_time(counted.photos.parent)
    data = photo.read_bytes()
    photo.write_bytes(data)
    os.utime(photo, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert counted.computes("cls")


def test_labels_are_those_of_the_set_and_not_of_the_cache(counted):
    counted.get("cls")
    names = ["apple", *sorted(COLORS)]
    found = counted.get("cls", photos=PhotoSet(counted.photos, 32, names))
    assert counted.images == 0
    assert found.labels.tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_an_extraction_that_breaks_off_leaves_nothing_behind(counted, monkeypatch):
    calls = []

    def fails(module, inputs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    hook = counted.backbone.norm.register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        counted.get("cls")
    hook.remove()
    assert [p for p in counted.folder.rglob("*") if p.is_file()] == []
    assert counted.computes("cls")


def full_disk(descriptor, offset, size):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_sentence_with_status_2_and_leaves_nothing(
    checkpoint, folders, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    given = ("--checkpoint", checkpoint, "--train", folders[0], "--val", folders[1])
    with pytest.raises(SystemExit) as stopped:
        knn.main([str(a) for a in (*given, "--cache", tmp_path, "--device", "cpu")])
    assert stopped.value.code == 2
    size = 24 * 32 * 4  # of class tokens
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert f"{tmp_path}: the feature cls takes {size:,} bytes (No space left on device)" in said
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert list(tmp_path.rglob(".partial-*")) == []


def test_a_file_system_that_reserves_no_space_is_used_all_the_same(counted, monkeypatch):
    def unsupported(descriptor, offset, size):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert len(counted.get("cls")) == 9


def test_the_space_of_an_array_is_reserved_before_it_is_written(tmp_path):
    path = tmp_path / "features" / "key" / ".partial" / "cls.0"
    path.parent.mkdir(parents=True)
    array = _new_array(path, (1024, 1024), np.dtype(np.float32))
    assert path.stat().st_blocks * 512 >= array.nbytes


def test_an_unfinished_entry_is_not_taken_for_a_whole_one(counted):
    counted.get("cls")
    (entry,) = counted.folder.glob("*/cls")
    entry.rename(entry.with_name(".partial-killed"))
    assert counted.computes("cls")


def test_a_damaged_array_is_refused_by_name(counted):
    counted.get("cls")
    (array,) = counted.folder.glob("*/cls/cls.npy")
    os.truncate(array, 200)
    with pytest.raises(ValueError, match=r"cls.npy is damaged .* remove"):
        counted.get("cls")


def test_unreadable_photos_are_left_out_of_cached_features_too(counted):
    (counted.photos / "green" / "1.jpg").write_bytes(b"no photo")
    for _ in range(2):
        found = counted.get("cls")
        assert found.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
        assert found["cls"].shape == (8, 32)
    expected = extract(small_vit(), PhotoSet(counted.photos, 32), ("cls",), HOW)
    assert_same(found, expected, ("cls",))
    for photo in counted.photos.rglob("*.jpg"):
        photo.write_bytes(b"no photo")
    with pytest.raises(ValueError, match="none of the 9 photos"):
        counted.get("cls")


def test_what_was_left_out_is_counted_once(counted, caplog):
    (counted.photos / "green" / "1.jpg").write_bytes(b"no photo")
    counted.get("cls")
    assert [r.message for r in caplog.records if "left out" in r.message and " of 9 " in r.message]
    assert caplog.text.count(" of 9 photos of ") == 1


def test_what_killed_runs_left_is_removed_after_a_day(counted):
    counted.get("cls")
    (key,) = counted.folder.iterdir()
    for name, age in (("old", 2), ("new", 0)):
        (key / f".partial-{name}").mkdir()
        (key / f".partial-{name}" / "cls.0").touch()
        for path in (key / f".partial-{name}" / "cls.0", key / f".partial-{name}"):
            os.utime(path, (time.time() - age * 86_400,) * 2)
    counted.get("patches")
    assert sorted(path.name for path in key.iterdir()) == [".partial-new", "cls", "patches"]


def _rank(rank, folder, photos):
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    counted = Counted(folder / "cache", photos)
    found = counted.get("cls", "parts", "patches")
    seen = {"images": counted.images, "labels": found.labels, **found.arrays}
    (folder / "damaged" / "x").mkdir(parents=True, exist_ok=True)
    (folder / "damaged" / "x" / "a.jpg").write_bytes(b"no photo")
    dist.barrier()
    with pytest.raises(ValueError, match="none of the") as refused:
        counted.get("cls", photos=PhotoSet(folder / "damaged", 32))
    np.savez(folder / f"{rank}.npz", refused=str(refused.value), **seen)
    leave_group(together=True)


def test_two_processes_share_the_work_and_give_the_features_of_one(tmp_path):
    photos = write_photos(tmp_path / "photos", COLORS, 3)
    (photos / "blue" / "1.jpg").write_bytes(b"no photo")
    mp.spawn(_rank, args=(tmp_path, photos), nprocs=2)
    ranks = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    assert [int(rank["images"]) for rank in ranks] == [4, 4]
    names = ("cls", "parts", "patches")
    alone = extract(small_vit(), PhotoSet(photos, 32), names, HOW)
    assert all("none of the" in str(rank["refused"]) for rank in ranks)
    for rank in ranks:
        assert rank["labels"].tolist() == alone.labels.tolist()
        for name in names:
            np.testing.assert_allclose(rank[name], alone.arrays[name], atol=1e-5)
    assert not Counted(tmp_path / "cache", photos).computes("cls")
