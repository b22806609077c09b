"""Where photos come from: a folder, or a tar read in place.

    photos/n01440764/a.JPEG       a folder of class folders, any depth below them
    photos/a.jpg                  a folder of photos: unlabelled
    ILSVRC2012_img_train.tar      a tar of class tars, never unpacked: photos are read by offset
    photos.tar                    a tar of photos, with or without class folders

A photo's class is the first folder (or class tar) of its name. Listing opens no photo.
"""

import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_JPEG = (".jpg", ".jpeg", ".jpe")
EXTENSIONS = (*_JPEG, ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
UNLABELLED = -1


@dataclass(slots=True, frozen=True)
class Photo:
    """One photo of a source; about 200 bytes, as there may be 14 million of them.

    name: below the source, with its class: `n01440764/n01440764_10026.JPEG`.
    label: index into the source's classes, or -1 for unlabelled.
    path: the folder or the tar that holds it.
    offset, size: bytes in the tar; None in a folder, where the photo is the file path/name.
    """

    name: str
    label: int
    path: str
    offset: int | None = None
    size: int | None = None


@dataclass(frozen=True)
class Source:
    """The photos of a folder or a tar in sorted order, and the classes that have any."""

    path: str
    photos: list[Photo]
    classes: list[str]


def read_bytes(photo: Photo) -> bytes:
    """The photo's file content, from any thread or process: each call opens the file for itself.

    Raises OSError where the file cannot be read, or the tar is shorter than when it was listed.
    """
    if photo.offset is None or photo.size is None:
        with open(os.path.join(photo.path, photo.name), "rb") as file:
            return file.read()
    with open(photo.path, "rb", buffering=0) as file:
        file.seek(photo.offset)
        data = file.read(photo.size) or b""
        while len(data) < photo.size and (more := file.read(photo.size - len(data))):
            data += more
    if len(data) < photo.size:
        raise OSError(f"{photo.path} ends inside {photo.name}; is it being changed?")
    return data


def open_source(path: str | Path) -> Source:
    """List the photos of a folder or a tar (also of tars) without opening them.

    Hidden files and folders are left out. Symlinks in folders are followed, loops cut, and one that
    leads nowhere is a photo that cannot be read; links inside a tar are left out.
    Raises FileNotFoundError for a missing path, ValueError for what is neither, or holds no photo.
    """
    root = os.path.abspath(path)
    if not os.path.exists(root):
        raise FileNotFoundError(f"{path} does not exist; give a folder of photos or a tar")
    if os.path.isdir(root):
        extents: dict[str, tuple[int, int]] = {}
        names = list(_walk(root, "", ()))
    else:
        extents = _without_common_folder(_index_tar(root))
        names = list(extents)
    if not names:
        raise ValueError(f"{path} holds no photos; looked for {' '.join(EXTENSIONS)} in any folder")
    names.sort(key=_sort_key)
    classes = sorted({name.partition("/")[0] for name in names if "/" in name})
    labels = {name: i for i, name in enumerate(classes)}
    photos = []
    for name in names:
        first, slash, _ = name.partition("/")
        label = labels[first] if slash else UNLABELLED
        photos.append(Photo(name, label, root, *extents.get(name, (None, None))))
    return Source(root, photos, classes)


def _sort_key(name: str) -> str:
    """Folder by folder, as a walk over sorted folders comes by: '/' before any other letter."""
    return name.replace("/", "\0")


def _is_photo(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _walk(root: str, below: str, inside: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Names of the photos in folder `below`; `inside` are the (device, inode) of its parents."""
    folder = os.path.join(root, below)
    stat = os.stat(folder)
    here = (stat.st_dev, stat.st_ino)
    if here in inside:  # a symlink to a folder that it stands in
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = below + entry.name
            if _is_folder(entry):
                yield from _walk(root, name + "/", (*inside, here))
            elif _is_photo(entry.name) and _is_to_be_read(entry):
                yield name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # Not entry.is_dir() for symlinks: it raises where they lead in a circle.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_to_be_read(entry: os.DirEntry[str]) -> bool:
    """Files, and symlinks that lead nowhere: those are to be reported, not passed over."""
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file()


def _index_tar(path: str) -> dict[str, tuple[int, int]]:
    """(offset, size) in the file by photo name; a name that comes twice keeps its last content."""
    try:
        with open(path, "rb") as file:
            return dict(_tar_photos(file, 0, ""))
    except tarfile.ReadError as error:
        raise ValueError(
            f"{path} is neither a folder nor a whole, uncompressed tar ({error});"
            " give a folder of photos or a tar, decompressed"
        ) from error


def _tar_photos(file: IO[bytes], start: int, prefix: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Photos of the tar in `file`, which begins `start` bytes into the outermost tar."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps every one of them
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            if not member.isreg() or any(part.startswith(".") for part in parts):
                continue
            name, begin = prefix + "/".join(parts), start + member.offset_data
            if _is_photo(name):
                yield name, (begin, member.size)
            elif name.lower().endswith(".tar") and (inner := tar.extractfile(member)):
                try:
                    yield from _tar_photos(inner, begin, name[: -len(".tar")] + "/")
                except tarfile.ReadError as error:
                    raise tarfile.ReadError(f"{name}: {error}") from error
        file.seek(tar.offset)  # a damaged header ends the list of members just as the end does
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"damaged at byte {tar.offset:,}")


def _without_common_folder(extents: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Drop a leading folder that all photos share (`tar cf train.tar train`) unless it is the one
    class there is: the classes are the folders below it."""
    while _share_a_parent(extents):
        extents = {name.partition("/")[2]: extent for name, extent in extents.items()}
    return extents


def _share_a_parent(names: Iterable[str]) -> bool:
    return len({name.split("/")[0] for name in names}) == 1 and all(
        name.count("/") > 1 for name in names
    )
