"""Where photos come from: a folder, or a tar read in place.

    photos/n01440764/a.JPEG       a folder of class folders, any depth below them
    photos/a.jpg                  a folder of photos: unlabeled
    ILSVRC2012_img_train.tar      a tar of class tars, never unpacked: photos are read by offset
    tars/n01440764.tar ...        a folder of class tars
    photos.tar                    a tar of photos, with or without class folders

A photo's class is the first folder (or class tar) of its name. Listing opens no photo.
"""

import difflib
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

_JPEG = (".jpg", ".jpeg", ".jpe")
EXTENSIONS = (*_JPEG, ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
UNLABELED = -1
_FEW = 1000
_SPLITS = ("train", "val", "valid", "validation", "test")
_MOST_LINKS = 10  # one after the other
_KAGGLE = os.path.join("Data", "CLS-LOC", "train")  # ImageNet as Kaggle packs it

# (offset, size) in a file, or the name of the member that a hard link stands for.
Extent = tuple[int, int] | str


@dataclass(slots=True, frozen=True)
class Photo:
    """One photo of a source; about 200 bytes, as there may be 14 million of them.

    name: below the source, with its class: `n01440764/n01440764_10026.JPEG`.
    label: index into the source's classes, or -1 for unlabeled.
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
    """The photos of a folder or a tar in sorted order, and the classes that have any.

    skipped: other files by kind (".heic", "links", "folders that may not be read").
    """

    path: str
    photos: list[Photo]
    classes: list[str]
    skipped: dict[str, int] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """What a user should know about the source: a sentence each."""
        notes = []
        if self.skipped:
            most = sorted(self.skipped.items(), key=lambda pair: (-pair[1], pair[0]))
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in most[:6])
            more = f" and {len(most) - 6} more kinds" if len(most) > 6 else ""
            total = sum(self.skipped.values())
            notes.append(f"{self.path}: skipped {total:,} that are not photos: {kinds}{more}")
        splits = [name for name in self.classes if name.lower() in _SPLITS]
        if len(splits) > 1:
            notes.append(
                f"the classes of {self.path} are {', '.join(splits)}: if these are splits of one"
                f" data set, give {os.path.join(self.path, splits[0])} or another one of them"
            )
        return notes


def read_bytes(photo: Photo) -> bytes:
    """The content of the photo's file; each call opens the file, from any thread or process.

    Raises OSError if the file cannot be read, or the tar is shorter than when it was listed.
    """
    if photo.offset is None or photo.size is None:
        with open(os.path.join(photo.path, photo.name), "rb") as file:
            return file.read()
    with open(photo.path, "rb") as file:
        file.seek(photo.offset)
        data = file.read(photo.size)
    if len(data) < photo.size:
        raise OSError(f"{photo.path} ends inside {photo.name}; is it being changed?")
    return data


def is_readable(photo: Photo) -> bool:
    """Whether a byte of the photo's file can be read now."""
    path = photo.path if photo.size is not None else os.path.join(photo.path, photo.name)
    with suppress(OSError), open(path, "rb") as file:
        return bool(file.read(1))
    return False


def _near(path: str) -> str:
    """A hint at the file or folder beside `path` whose name is most like its own, if any is; not
    among more than _FEW."""
    folder, name = os.path.split(path)
    there: list[str] = []
    with suppress(OSError), os.scandir(folder) as entries:
        there = [entry.name for entry in islice(entries, _FEW + 1)]
    near = difflib.get_close_matches(name, there, 1) if len(there) <= _FEW else []
    return f" (did you mean {near[0]}?)" if near else ""


def open_source(path: str | Path) -> Source:
    """List the photos of a folder or a tar (also of tars) without opening them.

    Hidden files and folders are ignored. Symlinks in folders are followed, except loops; a dangling
    one is an unreadable photo. Symlinks in a tar and unreadable folders below `path` are skipped
    and counted. Raises FileNotFoundError for a missing path, ValueError if it is neither folder nor
    tar, may not be read, or holds no photo or one that cannot be read in place (sparse members).
    """
    root = os.path.abspath(path)
    if not os.path.exists(root):
        raise FileNotFoundError(
            f"{path} does not exist; give a folder of photos or a tar{_near(root)}"
        )
    skipped: Counter[str] = Counter()
    if os.path.isdir(root):
        photos = _in_folder(root, skipped)
    else:
        photos = [(name, root, *at) for name, at in _photos_of_tar(root, skipped).items()]
    if not photos:
        found = ", ".join(f"{count:,} {kind}" for kind, count in skipped.most_common(6))
        raise ValueError(
            f"{path} holds no photos{f' (but {found})' if found else ''}; looked for"
            f" {' '.join(EXTENSIONS)} in any folder"
        )
    photos.sort(key=lambda photo: photo[0].replace("/", "\0"))  # folder by folder
    classes = sorted({name.partition("/")[0] for name, *_ in photos if "/" in name})
    labels = {name: i for i, name in enumerate(classes)}
    listed = []
    for name, holder, *extent in photos:
        first, slash, _ = name.partition("/")
        listed.append(Photo(name, labels[first] if slash else UNLABELED, holder, *extent))
    return Source(root, listed, classes, dict(+skipped))


def _in_folder(root: str, skipped: Counter[str]) -> list[tuple[Any, ...]]:
    """(name, holder) of the photos below a folder, or (name, tar, offset, size) of class tars."""
    for below in ("", "ILSVRC"):
        if os.path.isdir(train := os.path.join(root, below, _KAGGLE)):
            raise ValueError(f"{root} is ImageNet with all of its splits; give {train}")
    try:
        os.scandir(root).close()
    except OSError as error:
        raise ValueError(f"{root} may not be read ({error.strerror})") from error
    photos = [(name, root) for name in _walk(root, "", (), skipped)]
    if photos or not skipped[".tar"]:
        return photos
    tars = sorted(
        entry.path
        for entry in os.scandir(root)
        if entry.name.lower().endswith(".tar") and entry.name[0] != "." and entry.is_file()
    )
    found = []
    for tar in tars:
        name = os.path.basename(tar)[: -len(".tar")]
        extents = _photos_of_tar(tar, skipped)
        if any("/" in photo for photo in extents):
            raise ValueError(
                f"{root} holds several tars with classes of their own; give one: {tar}"
            )
        found += [(f"{name}/{photo}", tar, *extent) for photo, extent in extents.items()]
    skipped[".tar"] -= len(tars)
    return found


def _is_photo(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _kind(name: str) -> str:
    """How a file that is not a photo is counted."""
    return os.path.splitext(name)[1].lower() or "without an extension"


def _walk(
    root: str, below: str, inside: tuple[tuple[int, int], ...], skipped: Counter[str]
) -> Iterator[str]:
    """Names of the photos in folder `below`; `inside` are the (device, inode) of its parents."""
    folder = os.path.join(root, below)
    try:
        stat = os.stat(folder)
        entries = os.scandir(folder)
    except PermissionError:  # such as lost+found
        skipped["folders that may not be read"] += 1
        return
    here = (stat.st_dev, stat.st_ino)
    if here in inside:  # a symlink to a folder around it
        return
    with entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = below + entry.name
            # Not entry.is_dir() for symlinks: it raises if they form a circle.
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                yield from _walk(root, name + "/", (*inside, here), skipped)
            elif _is_photo(entry.name) and _is_to_be_read(entry):
                yield name
            else:
                skipped[_kind(entry.name)] += 1


def _is_to_be_read(entry: os.DirEntry[str]) -> bool:
    """Files, and dangling symlinks, which are reported instead of skipped."""
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file()


def _photos_of_tar(path: str, skipped: Counter[str]) -> dict[str, tuple[int, int]]:
    """(offset, size) in the file by photo name; of equal names the last one counts."""
    try:
        with open(path, "rb") as file:
            found = dict(_tar_photos(file, 0, "", skipped))
    except tarfile.ReadError as error:
        raise ValueError(
            f"{path} is neither a folder nor a whole, uncompressed tar ({error});"
            " give a folder of photos or a tar, decompressed"
        ) from error
    except PermissionError as error:
        raise ValueError(f"{path} may not be read ({error.strerror})") from error
    extents = {}
    for name, extent in found.items():
        for _ in range(_MOST_LINKS):  # from one link to another, perhaps
            if isinstance(extent, str):
                extent = found.get(extent, extent)
        if isinstance(extent, str):
            raise ValueError(
                f"{path}: {name} is a hard link to {extent}, which is not a photo in this tar"
            )
        extents[name] = extent
    # Classes are the folders below one that all photos share (`tar cf train.tar train`), unless
    # that is the only class.
    while len({name.split("/")[0] for name in extents}) == 1 and all(
        name.count("/") > 1 for name in extents
    ):
        extents = {name.partition("/")[2]: extent for name, extent in extents.items()}
    return extents


def _tar_photos(
    file: IO[bytes], start: int, prefix: str, skipped: Counter[str]
) -> Iterator[tuple[str, Extent]]:
    """Photos of the tar in `file`, which begins `start` bytes into the outermost tar."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps every one of them
            name = _member_name(member.name)
            if member.isdir() or name is None:
                continue
            if ".." in name.split("/"):
                skipped["outside of the tar"] += 1
                continue
            if not (member.isreg() or member.islnk()):
                skipped["links" if member.issym() else "devices"] += 1
                continue
            begin = start + member.offset_data
            is_photo, is_tar = _is_photo(name), name.lower().endswith(".tar")
            if (is_photo or is_tar) and member.issparse():
                raise ValueError(
                    f"{prefix}{name} is stored sparse: its bytes are not in one piece;"
                    " make the tar without -S (--sparse)"
                )
            if is_photo:
                if member.islnk():
                    yield prefix + name, prefix + (_member_name(member.linkname) or member.linkname)
                else:
                    yield prefix + name, (begin, member.size)
            elif is_tar and (inner := tar.extractfile(member)):
                name = prefix + name
                try:
                    yield from _tar_photos(inner, begin, name[: -len(".tar")] + "/", skipped)
                except tarfile.ReadError as error:
                    raise tarfile.ReadError(f"{name}: {error}") from error
            else:
                skipped[_kind(name)] += 1
        file.seek(tar.offset)  # a damaged header ends the list of members just as the end does
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"damaged at byte {tar.offset:,}")


def _member_name(name: str) -> str | None:
    """A member's name without empty parts; None for hidden ones."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    hidden = any(part.startswith(".") and part != ".." for part in parts)
    return None if hidden else "/".join(parts)
