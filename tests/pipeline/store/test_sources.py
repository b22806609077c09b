"""Photos of real folders and real tars, listed without opening them."""

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ibeton.pipeline.store.photos import open_photos
from ibeton.pipeline.store.sources import UNLABELED, Photo, Source, open_source, read_bytes


def put(root: Path, *names: str) -> Path:
    """Files below `root` whose content is their own name: listing does not look inside."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def tar_of(files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in files.items():
            add(tar, name, data)
    return buffer.getvalue()


def named(source: Source) -> dict[str, str]:
    """Photo name -> its class, or "" where it is unlabeled."""
    return {p.name: "" if p.label < 0 else source.classes[p.label] for p in source.photos}


def contents(source: Source) -> dict[str, bytes]:
    return {photo.name: read_bytes(photo) for photo in source.photos}


def test_the_first_folder_of_a_photo_is_its_class(tmp_path: Path) -> None:
    put(tmp_path, "dog/b.jpg", "cat/deep/er/a.jpg", "cat/c.jpg", "dog/a.jpg", "notes/read.txt")
    source = open_source(tmp_path)
    assert named(source) == {
        "cat/c.jpg": "cat",
        "cat/deep/er/a.jpg": "cat",
        "dog/a.jpg": "dog",
        "dog/b.jpg": "dog",
    }
    assert source.classes == ["cat", "dog"]  # a class is a folder that holds photos
    assert contents(source) == {name: name.encode() for name in named(source)}


def test_photos_come_in_sorted_order_folder_by_folder(tmp_path: Path) -> None:
    put(tmp_path, "a b/1.jpg", "a/2.jpg", "a/10.jpg", "a-c/1.jpg", "B/1.jpg")
    names = [photo.name for photo in open_source(tmp_path).photos]
    assert names == ["B/1.jpg", "a/10.jpg", "a/2.jpg", "a b/1.jpg", "a-c/1.jpg"]


def test_photos_outside_class_folders_are_unlabeled(tmp_path: Path) -> None:
    flat = open_source(put(tmp_path / "flat", "b.jpg", "a.jpg"))
    assert [(p.name, p.label) for p in flat.photos] == [
        ("a.jpg", UNLABELED),
        ("b.jpg", UNLABELED),
    ]
    assert flat.classes == []
    mixed = open_source(put(tmp_path / "mixed", "loose.jpg", "cat/a.jpg"))
    assert named(mixed) == {"loose.jpg": "", "cat/a.jpg": "cat"}


def test_extensions_are_known_in_any_case_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    shown = ["a.JPEG", "b.Jpg", "c.jpe", "d.PNG", "e.webp", "f.BMP", "g.tif", "h.TIFF", "i.gif"]
    put(tmp_path, *shown, ".hidden.jpg", "._a.JPEG", ".cache/a.jpg", "list.txt", "a.jpg.part")
    assert [photo.name for photo in open_source(tmp_path).photos] == shown


def test_symlinks_are_followed_and_loops_are_cut(tmp_path: Path) -> None:
    elsewhere = put(tmp_path / "elsewhere", "one.jpg", "two.jpg")
    photos = put(tmp_path / "photos", "cat/a.jpg", "cat/sub/b.jpg")
    (photos / "dog").symlink_to(elsewhere)
    (photos / "cat" / "linked.jpg").symlink_to(elsewhere / "one.jpg")
    (photos / "cat" / "sub" / "up").symlink_to(photos / "cat")  # to a folder that it stands in
    (photos / "cat" / "self").symlink_to(photos / "cat" / "self")
    source = open_source(photos)
    assert named(source) == {
        "cat/a.jpg": "cat",
        "cat/linked.jpg": "cat",
        "cat/sub/b.jpg": "cat",
        "dog/one.jpg": "dog",
        "dog/two.jpg": "dog",
    }
    assert contents(source)["cat/linked.jpg"] == b"one.jpg"


def test_a_symlink_that_leads_nowhere_is_listed_and_fails_when_read(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "never.jpg")
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for a writer
    _, gone, circle = open_source(tmp_path).photos
    assert (gone.name, circle.name) == ("gone.jpg", "self.jpg")
    for photo in (gone, circle):
        with pytest.raises(OSError, match=photo.name):
            read_bytes(photo)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_class_tars_lists_and_reads_as_the_folder_it_stands_for(
    tmp_path: Path, form: int
) -> None:
    names = [f"n0{i}/n0{i}_{j:02d}.JPEG" for i in range(3) for j in range(4)]
    folder = open_source(put(tmp_path / "folder", *names))
    inner = {
        f"n0{i}.tar": tar_of(
            {name.split("/")[1]: name.encode() for name in names if name.startswith(f"n0{i}")}, form
        )
        for i in range(3)
    }
    path = tmp_path / "train.tar"
    path.write_bytes(tar_of(inner, form))
    tarred = open_source(path)
    assert tarred.classes == folder.classes
    assert [(p.name, p.label) for p in tarred.photos] == [(p.name, p.label) for p in folder.photos]
    assert contents(tarred) == contents(folder)


def test_long_names_in_a_tar_are_read_where_they_stand(tmp_path: Path) -> None:
    long = "cat/" + "x" * 180 + ".jpg"  # has a header of its own
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{form}.tar"
        path.write_bytes(tar_of({"cat.tar": tar_of({long: b"long", "b.jpg": b"short"}, form)}))
        assert contents(open_source(path)) == {"cat/b.jpg": b"short", f"cat/{long}": b"long"}


def test_plain_tars_have_classes_where_they_have_folders(tmp_path: Path) -> None:
    path = tmp_path / "photos.tar"
    path.write_bytes(tar_of({"./b.jpg": b"b", "./a.jpg": b"a", "./._a.jpg": b"?"}))
    assert named(open_source(path)) == {"a.jpg": "", "b.jpg": ""}
    path.write_bytes(tar_of({"dog/x.jpg": b"x", "cat/deep/y.PNG": b"y", "readme.txt": b"-"}))
    source = open_source(path)
    assert named(source) == {"cat/deep/y.PNG": "cat", "dog/x.jpg": "dog"}
    assert contents(source) == {"cat/deep/y.PNG": b"y", "dog/x.jpg": b"x"}


def test_a_folder_around_all_classes_of_a_tar_is_no_class(tmp_path: Path) -> None:
    path = tmp_path / "train.tar"
    path.write_bytes(tar_of({"train/dog/x.jpg": b"x", "train/cat/y.jpg": b"y"}))
    assert named(open_source(path)) == {"cat/y.jpg": "cat", "dog/x.jpg": "dog"}
    path.write_bytes(tar_of({"cat/x.jpg": b"x", "cat/y.jpg": b"y"}))
    assert named(open_source(path)) == {"cat/x.jpg": "cat", "cat/y.jpg": "cat"}


def test_the_last_of_two_members_with_one_name_counts(tmp_path: Path) -> None:
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a.jpg", b"old")
        add(tar, "a.jpg", b"new")
    assert contents(open_source(path)) == {"a.jpg": b"new"}


def test_what_is_no_source_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; give a folder .* tar$"):
        open_source(tmp_path / "nowhere")
    put(tmp_path, "photos.beton")
    with pytest.raises(FileNotFoundError, match=r"a tar \(did you mean photos\.beton\?\)"):
        open_source(tmp_path / "photos.betn")
    put(tmp_path / "many", *(f"photo{i}.jpg" for i in range(1001)))
    with pytest.raises(FileNotFoundError, match=r"a tar$"):  # no search among many
        open_source(tmp_path / "many" / "photo.jpg")
    with pytest.raises(ValueError, match="holds no photos"):
        open_source(put(tmp_path / "empty", ".hidden.jpg", "readme.txt"))
    with pytest.raises(ValueError, match=r"a\.txt is neither a folder nor a whole, uncompressed"):
        open_source(put(tmp_path, "a.txt") / "a.txt")
    (tmp_path / "none.tar").write_bytes(tar_of({"readme.txt": b"-"}))
    with pytest.raises(ValueError, match="holds no photos"):
        open_source(tmp_path / "none.tar")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        add(tar, "a.jpg", b"a")
    with pytest.raises(ValueError, match="decompressed"):
        open_source(tmp_path / "a.tar.gz")


def test_a_tar_that_lost_its_end_is_refused(tmp_path: Path) -> None:
    whole = tar_of({f"{i}.jpg": bytes(700) for i in range(5)})  # 512 header + 1024 data each
    path = tmp_path / "cut.tar"
    for cut in (3 * 1536 + 100, 3 * 1536 + 512 + 100):  # inside a header, inside a photo
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cut\.tar is neither"):
            open_source(path)


def test_a_damaged_header_in_a_tar_is_no_end_of_the_list(tmp_path: Path) -> None:
    inner = bytearray(tar_of({f"{i}.jpg": bytes(700) for i in range(5)}))
    inner[2 * 1536 + 20] ^= 255
    path = tmp_path / "train.tar"
    path.write_bytes(inner)
    with pytest.raises(ValueError, match="damaged at byte 3,072"):
        open_source(path)
    path.write_bytes(tar_of({"cat.tar": bytes(inner)}))
    with pytest.raises(ValueError, match=r"cat\.tar: damaged at byte 3,072"):
        open_source(path)


def test_a_photo_of_a_tar_that_shrank_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of({"a.jpg": bytes(5000)}))
    (photo,) = open_source(path).photos
    os.truncate(path, 3000)
    with pytest.raises(OSError, match=r"ends inside a\.jpg"):
        read_bytes(photo)


def test_a_photo_entry_stays_small() -> None:
    assert not hasattr(Photo("a.jpg", 0, "/"), "__dict__")


def test_what_is_skipped_is_counted_by_kind(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "b.jpg", "c.HEIC", "d.heic", "e.avif", "README", ".hidden")
    source = open_source(tmp_path)
    assert source.skipped == {".heic": 2, ".avif": 1, "without an extension": 1}
    (note,) = source.notes()
    assert note.endswith("not photos: 2 .heic, 1 .avif, 1 without an extension")
    only = put(tmp_path / "only", "x.heic")
    with pytest.raises(ValueError, match=r"holds no photos \(but 1 \.heic\)"):
        open_source(only)


def test_hard_links_in_a_tar_are_photos_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "all/cat/a.jpg", b"first")
        for name, target in (
            ("all/dog/b.jpg", "all/cat/a.jpg"),
            ("all/dog/c.jpg", "all/dog/b.jpg"),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, target
            tar.addfile(link)
    source = open_source(path)
    assert contents(source) == dict.fromkeys(("cat/a.jpg", "dog/b.jpg", "dog/c.jpg"), b"first")
    assert named(source)["dog/c.jpg"] == "dog"


@pytest.mark.parametrize("target", ["gone.jpg", "b.jpg"])
def test_a_hard_link_to_nothing_is_refused_by_name(tmp_path: Path, target: str) -> None:
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a.jpg", b"a")
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, target
        tar.addfile(link)
    with pytest.raises(
        ValueError, match=f"b.jpg is a hard link to {target}, which is not a photo in this tar"
    ):
        open_source(path)


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_sparse_members_are_refused_by_name(tmp_path: Path, format: str) -> None:
    if not (program := shutil.which("tar")):
        pytest.skip("no tar program")
    with open(tmp_path / "photo.bmp", "wb") as file:
        file.write(b"BM")
        file.seek(1 << 20)
        file.write(b"end")
    command = [program, "-S", f"--format={format}", "-cf", "photos.tar", "photo.bmp"]
    if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("this tar stores no sparse files")
    with pytest.raises(ValueError, match=r"photo\.bmp is stored sparse"):
        open_source(tmp_path / "photos.tar")


def test_members_outside_of_the_tar_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "photos.tar"
    path.write_bytes(tar_of({"../photos/x/a.jpg": b"a", "x/b.jpg": b"b", ".x/c.jpg": b"c"}))
    source = open_source(path)
    assert list(contents(source)) == ["x/b.jpg"]
    assert source.skipped == {"outside of the tar": 1}


def test_symlinks_in_a_tar_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a.jpg", b"a")
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        tar.addfile(link)
    assert open_source(path).skipped == {"links": 1}


@pytest.mark.parametrize("above", ["ILSVRC/", ""])
def test_imagenet_with_all_its_splits_names_the_one_to_give(tmp_path: Path, above: str) -> None:
    below = f"{above}Data/CLS-LOC"
    put(tmp_path, f"{below}/train/n01/a.JPEG", f"{below}/val/b.JPEG", f"{below}/test/c.JPEG")
    with pytest.raises(ValueError, match=f"all of its splits; give .*{below}/train$"):
        open_source(tmp_path)
    assert open_source(tmp_path / below / "train").classes == ["n01"]


def test_splits_taken_for_classes_are_remarked(tmp_path: Path) -> None:
    source = open_source(put(tmp_path, "train/cat/a.jpg", "val/cat/b.jpg"))
    assert "the classes of" in source.notes()[0]
    assert open_source(put(tmp_path / "other", "train/a.jpg", "plane/b.jpg")).notes() == []


def test_a_folder_of_class_tars_is_read(tmp_path: Path) -> None:
    for kind in ("n02", "n01"):
        (tmp_path / f"{kind}.tar").write_bytes(tar_of({f"{kind}_{i}.JPEG": b"x" for i in range(2)}))
    put(tmp_path, "list.txt")
    (tmp_path / "._n01.tar").write_bytes(b"of macOS")
    (tmp_path / "old.tar").mkdir()
    source = open_source(tmp_path)
    assert source.classes == ["n01", "n02"]
    assert list(contents(source)) == [f"n0{k}/n0{k}_{i}.JPEG" for k in (1, 2) for i in range(2)]
    assert {photo.path for photo in source.photos} == {
        str(tmp_path / f"{kind}.tar") for kind in ("n01", "n02")
    }
    assert source.notes()[0].endswith("skipped 1 that are not photos: 1 .txt")


def test_a_folder_of_several_data_sets_as_tars_names_one(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / f"{split}.tar").write_bytes(tar_of({"cat/a.jpg": b"a", "dog/b.jpg": b"b"}))
    with pytest.raises(ValueError, match=r"several tars .* give one: .*train\.tar"):
        open_source(tmp_path)


@pytest.fixture
def as_another_user() -> Iterator[Path]:
    """A folder that all may read, while this process is not root."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    root = os.geteuid() == 0
    yield folder
    if root:
        os.seteuid(0)
    for path in folder.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(folder)


def leave_root() -> None:
    if os.geteuid() == 0:
        os.seteuid(65534)


def test_a_folder_that_may_not_be_read_is_skipped_below_and_named_at_the_top(
    as_another_user: Path,
) -> None:
    put(as_another_user, "cat/a.jpg", "lost+found/b.jpg")
    (as_another_user / "lost+found").chmod(0)
    leave_root()
    source = open_source(as_another_user)
    assert named(source) == {"cat/a.jpg": "cat"}
    assert source.skipped == {"folders that may not be read": 1}
    with pytest.raises(ValueError, match=r"lost\+found may not be read"):
        open_source(as_another_user / "lost+found")


@pytest.mark.parametrize("name", ["photos.tar", "photos.beton"])
def test_a_file_that_may_not_be_read_is_named(as_another_user: Path, name: str) -> None:
    path = as_another_user / name
    path.write_bytes(bytes(10_000))
    path.chmod(0)
    leave_root()
    with pytest.raises(ValueError, match=f"{name} may not be read"):
        open_photos(path)
