"""The .beton file format (FFCV's version 2), and its reader; `beton_writer.py` writes it.

    header            version, fields, page size, number of samples, place of the allocation table
    two fields        `image` (RGBImageField, type 2) and `label` (IntField, type 1)
    metadata          24 bytes per sample: mode, width, height, pointer to the data; label
    data              JPEG bytes or raw pixels, from the first page on, each within one page
    allocation table  (sample, pointer, size), up to the end of the file

The converter also writes `photos.beton.json` with what the format has no field for: class names,
source, options, counts, unreadable photos and checksums. It is optional.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ibeton.pipeline.store.decode import UnreadablePhoto, decode_photo

VERSION = 2
JPG, RAW = 0, 1  # modes of a stored photo
MAX_SIDE = 65535  # width and height are uint16
MIN_PAGE = 1 << 21  # FFCV's least, 2 MiB
FIRST_PAGE = 1 << 23  # FFCV's default, 8 MiB
MAX_PHOTO = 1 << 31  # bytes; a page is a power of two that fits uint32

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

FIELDS = [(2, b"image"), (1, b"label")]
METADATA_START = HEADER.itemsize + len(FIELDS) * FIELD.itemsize


def sidecar_path(path: str | Path) -> Path:
    """The JSON beside a .beton file: photos.beton -> photos.beton.json."""
    return Path(f"{path}.json")


class BetonReader:
    """A .beton file with the fields `image` and `label`. Photos are read on demand.

    labels: int64 [n], -1 if unlabeled. widths, heights: uint16 [n]. modes: uint8 [n], JPG or RAW.
    pointers, sizes: uint64 [n], place and number of the stored bytes. files: int32 [n], descriptors
    of the file that holds them. classes: names from the JSON beside the file, or [].

    The file is read by `pread`, not mapped into memory: if it is truncated while in use, that is an
    error, where mapped memory would kill the process (SIGBUS).

    Raises FileNotFoundError, and ValueError for a file that may not be read, is not a .beton, has
    another version or other fields, is truncated or damaged, or is beside the JSON of another file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            what = "is not a file" if self.path.exists() else "does not exist"
            raise FileNotFoundError(f"{path} {what}; create it with: ibeton convert SRC DST.beton")
        try:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - lives as long as self
        except PermissionError as error:
            raise ValueError(f"{path} may not be read; check its permissions") from error
        self._bytes = os.fstat(self._file.fileno()).st_size
        if self._bytes < METADATA_START:
            raise ValueError(f"{path} is not a .beton file: it is too small")
        header = self._array(HEADER, 0, 1)[0]
        self._check_header(header)
        self.num_samples, self.page_size = int(header["num_samples"]), int(header["page_size"])
        samples, table = self._tables(int(header["alloc_table_ptr"]))
        self.labels = samples["label"].astype(np.int64)
        self.modes = samples["image"]["mode"].copy()
        self.widths = samples["image"]["width"].copy()
        self.heights = samples["image"]["height"].copy()
        self.pointers = samples["image"]["data_ptr"].copy()
        self.sizes = self._sizes(table)
        self.files = np.full(self.num_samples, self.fileno(), np.int32)
        self.sidecar = self._read_sidecar()
        self.classes: list[str] = self.sidecar.get("classes", [])
        self.notes: list[str] = []

    def fileno(self) -> int:
        """Descriptor of the open file, which this object closes."""
        return self._file.fileno()

    def __len__(self) -> int:
        return self.num_samples

    def name(self, index: int) -> str:
        """The photo's name in messages."""
        return f"photo {index} of {self.path}"

    def photo_bytes(self, index: int) -> bytes:
        """The stored bytes, JPEG or raw pixels by `modes[index]`.

        Raises OSError if the file has become shorter since it was opened.
        """
        return self._read(int(self.pointers[index]), int(self.sizes[index]))

    def sample(self, index: int) -> tuple[int, int, int, int, bytes]:
        """Label, mode, width, height and stored bytes."""
        noted = (self.labels, self.modes, self.widths, self.heights)
        label, mode, width, height = (int(values[index]) for values in noted)
        return label, mode, width, height, self.photo_bytes(index)

    def _read(self, begin: int, size: int) -> bytes:
        parts = []
        while size and (part := os.pread(self.fileno(), size, begin)):  # 2 GiB at most at once
            parts.append(part)
            size, begin = size - len(part), begin + len(part)
        if size:
            raise OSError(
                f"{self.path} ends at byte {begin:,}, before what it held when it was opened:"
                " it was cut short or replaced while in use"
            )
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _array(self, dtype: np.dtype, begin: int, count: int) -> np.ndarray:
        return np.frombuffer(self._read(begin, count * dtype.itemsize), dtype)

    def pixels(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3]; raises UnreadablePhoto, also for another size than in the metadata."""
        data = self.photo_bytes(index)
        shape = (int(self.heights[index]), int(self.widths[index]), 3)
        if self.modes[index] == RAW:
            if len(data) != np.prod(shape):
                raise UnreadablePhoto(f"{len(data)} bytes of raw pixels do not make {shape}")
            return np.frombuffer(data, np.uint8).reshape(shape).copy()
        if self.modes[index] != JPG:
            raise UnreadablePhoto(f"mode {self.modes[index]} is neither jpg (0) nor raw (1)")
        pixels = decode_photo(data)
        if pixels.shape != shape:
            raise UnreadablePhoto(f"decodes to {pixels.shape}, the file says {shape}")
        return pixels

    def _check_header(self, header: np.void) -> None:
        page = int(header["page_size"])
        if page < MIN_PAGE or page & (page - 1) or not header["num_fields"]:
            raise ValueError(f"{self.path} is not a .beton file: its header makes no sense")
        if header["version"] != VERSION:
            raise ValueError(
                f"{self.path} is a .beton of version {header['version']}, version {VERSION} is"
                " read; convert the photos anew"
            )
        end = HEADER.itemsize + int(header["num_fields"]) * FIELD.itemsize
        if end > self._bytes:
            raise ValueError(f"{self.path} is cut short inside its field list")
        fields = self._array(FIELD, HEADER.itemsize, int(header["num_fields"]))
        found = [(int(f["type_id"]), bytes(f["name"])) for f in fields]
        if found != FIELDS:
            named = ", ".join(f"{name.decode('ascii', 'replace')} (type {t})" for t, name in found)
            raise ValueError(
                f"{self.path} has the fields {named}; expected image (RGBImageField, type 2) and"
                " label (IntField, type 1), in this order"
            )

    def _tables(self, table_start: int) -> tuple[np.ndarray, np.ndarray]:
        """The metadata and the allocation table."""
        data_start = METADATA_START + self.num_samples * SAMPLE.itemsize
        rest = self._bytes - table_start
        samples = self.num_samples
        if table_start < data_start or rest < samples * ALLOCATION.itemsize:
            raise ValueError(
                f"{self.path} is cut short or was never finished: {self._bytes:,} bytes do not"
                f" hold {samples:,} samples and their table; convert the photos anew"
            )
        table = self._array(ALLOCATION, table_start, rest // ALLOCATION.itemsize)
        return self._array(SAMPLE, METADATA_START, samples), table

    def _sizes(self, table: np.ndarray) -> np.ndarray:
        """Stored bytes of each sample, uint64 [n]: its pointer, looked up in the table."""
        if not self.num_samples:
            return np.zeros(0, np.uint64)
        pointers = table["ptr"]
        order = np.argsort(pointers, kind="stable")  # FFCV's own writer leaves them unordered
        place = np.searchsorted(pointers, self.pointers, sorter=order)
        entry = table[order[np.minimum(place, len(order) - 1)]]
        end, page = np.uint64(self._bytes), np.uint64(self.page_size)
        beyond = (entry["ptr"] > end) | (entry["size"] > end - entry["ptr"])
        crosses = entry["ptr"] % page + entry["size"] > page
        # FFCV's process cache and its quasi-random order go by the sample number and the page.
        another = entry["sample_id"] != np.arange(self.num_samples, dtype=np.uint64)
        wrong = np.flatnonzero((entry["ptr"] != self.pointers) | beyond | crosses | another)
        if len(wrong):
            raise ValueError(
                f"{self.path} is damaged: the data of {len(wrong):,} samples, the first of them"
                f" {wrong[0]}, is not where its table says; convert the photos anew"
            )
        return entry["size"].copy()

    def _read_sidecar(self) -> dict[str, Any]:
        path = sidecar_path(self.path)
        if not path.exists():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            size = content["file_bytes"]
            content["classes"] = [str(name) for name in content.get("classes", [])]
            content["checksums"] = dict(content.get("checksums", {}))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not what the converter writes; remove it") from error
        if size != self._bytes:
            raise ValueError(
                f"{path} describes a file of {size:,} bytes, {self.path} has"
                f" {self._bytes:,}; remove it, or put back the .beton it was written with"
            )
        return content
