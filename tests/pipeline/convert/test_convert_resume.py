"""A conversion that was killed, interrupted or failed goes on, and writes what it would have."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

from ibeton.pipeline.convert import converter as convert_module
from ibeton.pipeline.convert import journal as journal_module
from ibeton.pipeline.convert.converter import ConversionReport, ConvertOptions, convert
from ibeton.pipeline.convert.journal import journal_path, partial_path
from ibeton.pipeline.store.beton import FIRST_PAGE, BetonReader

# The command itself, with a mark as soon as the disk has the one before instead of every two
# seconds. It stops after HOLD marks until it is killed, or until the file GO is there: a test
# cannot be too late, however busy the machine is.
SLOWED = """
import os, sys, time
from ibeton import progress
from ibeton.pipeline.convert import converter, journal
journal.MARK_EVERY_S, progress._LINE_EVERY_S = 0.0, float("inf")
tick, hold, go = journal.Journal.tick, int(os.environ["HOLD"]), os.environ["GO"]
def slow(self, *arguments):
    tick(self, *arguments)
    time.sleep(0.004)
    if self.done.photos > 200 and self._pending:  # of 300: now each leaves a mark
        self._pending.result()
    while journal.journal_path(self.dst).read_bytes().count(b"\\n") > hold:
        if os.path.exists(go):
            break
        time.sleep(0.01)
journal.Journal.tick = slow
sys.exit(converter.main())
"""
COMMAND = [sys.executable, "-c", SLOWED]
NEVER = 1000


def photo_bytes(seed: int, width: int, height: int, kind: str = "JPEG") -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of 300 photos in three classes, one loose, some to be encoded, some unreadable."""
    path = tmp_path_factory.mktemp("tar") / "photos.tar"
    jpegs = [photo_bytes(seed, 150 + 20 * seed, 120) for seed in range(10)]
    png, broken = photo_bytes(1, 90, 60, "PNG"), jpegs[0][:1500]
    with tarfile.open(path, "w") as tar:
        for i in range(300):
            data = broken if i % 17 == 5 else png if i % 9 == 4 else jpegs[i % 10]
            member = tarfile.TarInfo("loose.jpg" if i == 50 else f"class{i % 3}/{i:03d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one uninterrupted conversion leaves, as pixels."""
    folder = tmp_path_factory.mktemp("whole")
    convert(photos, folder / "a.beton", ConvertOptions(write_mode="raw", workers=1))
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def marks(folder: Path) -> int:
    path = journal_path(folder / "a.beton")
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


@pytest.fixture
def started(photos: Path, tmp_path: Path) -> Iterator[Any]:
    """Starts the command, which stops after `hold` marks; it is gone when the test ends."""
    running: list[subprocess.Popen[str]] = []

    def start(*options: str, hold: int = NEVER) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*COMMAND, str(photos), str(tmp_path / "a.beton"), "--write-mode", "raw", *options],
            cwd=ROOT,
            env={**os.environ, "HOLD": str(hold), "GO": str(tmp_path.with_name("go"))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def wait_for_marks(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    while marks(folder) < count:
        assert process.poll() is None, "it ended before it was stopped"
        time.sleep(0.002)


def test_a_conversion_killed_twice_ends_with_the_bytes_of_an_unbroken_one(
    started: Any, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    for marked in (1, 13):
        process = started("--workers", "2", hold=marked + 10)
        wait_for_marks(process, tmp_path, marked)
        process.kill()
        process.communicate()
        assert sorted(os.listdir(tmp_path)) == [".a.beton.journal", ".a.beton.partial"]
    process = started("--workers", "1")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "photos of an unfinished conversion" in out
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_says_what_it_keeps_and_goes_on(
    started: Any, tmp_path: Path, whole: dict[str, bytes], sign: signal.Signals
) -> None:
    process = started(hold=12)
    wait_for_marks(process, tmp_path, 2)
    process.send_signal(sign)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    kept = partial_path(tmp_path / "a.beton")
    assert err == (
        f"interrupted; what was done is kept in {kept}: the same command resumes it, --restart"
        " starts over\n"
    )
    process = started()
    out, _ = process.communicate()
    assert "photos of an unfinished conversion" in out
    assert contents(tmp_path) == whole


def test_a_running_conversion_is_left_alone(photos: Path, started: Any, tmp_path: Path) -> None:
    process = started(hold=1)
    wait_for_marks(process, tmp_path, 1)
    with pytest.raises(FileExistsError, match=r"another conversion is writing .*a\.beton; wait"):
        convert(photos, tmp_path / "a.beton", ConvertOptions(write_mode="raw"))
    tmp_path.with_name("go").touch()
    assert process.wait() == 0
    tmp_path.with_name("go").unlink()
    assert sorted(os.listdir(tmp_path)) == ["a.beton", "a.beton.json"]


# ---- in this process, stopped at a given photo ----


def converted(src: Path, dst: Path, **options: Any) -> ConversionReport:
    return convert(src, dst, ConvertOptions(**{"workers": 1, **options}))


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a conversion that raises `error` at its `at`-th stored photo."""

    def stopped(src: Path, dst: Path, at: int, error: BaseException, **options: Any) -> None:
        count, append, tick = 0, convert_module._append, journal_module.Journal.tick

        def marking(journal: journal_module.Journal, *arguments: Any) -> None:
            tick(journal, *arguments)
            if journal._pending and journal.done.photos % 10 == 0:  # the disk may be busy
                journal._pending.result()

        def failing(*arguments: Any) -> None:
            nonlocal count
            count += 1
            if count == at:
                raise error
            append(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(convert_module, "_append", failing)
            patch.setattr(journal_module, "MARK_EVERY_S", 0.0)
            patch.setattr(journal_module.Journal, "tick", marking)
            with pytest.raises(type(error)):
                converted(src, dst, **options)

    return stopped


@pytest.mark.parametrize(
    "options",
    [{}, {"shuffle": True, "subset": 290}, {"max_resolution": 300}, {"shard": "1/1"}],
    ids=lambda options: "-".join(options) or "keep",
)
def test_every_way_of_storing_goes_on(
    photos: Path, tmp_path: Path, stop: Any, options: dict[str, Any]
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    converted(photos, tmp_path / "one" / "a.beton", **options)
    dst = tmp_path / "two" / "a.beton"
    stop(photos, dst, 270, KeyboardInterrupt(), **options)  # in the second block of checksums
    report = converted(photos, dst, verify=True, **options)
    assert report.before > 20
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_full_disk_keeps_what_was_done(photos: Path, tmp_path: Path, stop: Any) -> None:
    dst = tmp_path / "a.beton"
    stop(photos, dst, 100, OSError(28, "No space left on device"))
    assert marks(tmp_path) > 0
    assert converted(photos, dst).before > 0


def test_data_that_the_disk_did_not_take_are_not_published(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only flush in the background fails, and no later mark would tell."""
    dst, fsync = tmp_path / "a.beton", os.fsync

    def failing(file: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.EIO, "Input/output error")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "MARK_EVERY_S", 0.0)
        patch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="Input/output error"):
            converted(photos, dst, subset=1)
    assert not dst.exists()
    assert converted(photos, dst, subset=1).photos == 1


def test_a_power_cut_in_mid_write_costs_the_last_mark_only(
    photos: Path, tmp_path: Path, stop: Any, whole: dict[str, bytes]
) -> None:
    dst = tmp_path / "a.beton"
    stop(photos, dst, 150, KeyboardInterrupt(), write_mode="raw")
    journal = journal_path(dst).read_bytes()
    torn = journal[: journal.rindex(b"\n", 0, -1) + 40]  # 40 bytes of the last line
    journal_path(dst).write_bytes(torn)
    with open(partial_path(dst), "ab") as file:
        file.write(b"\xa5" * 300_000)
    assert converted(photos, dst, write_mode="raw").before > 0
    assert contents(tmp_path) == whole


def test_a_disk_that_takes_a_part_of_each_write_costs_no_marks(
    photos: Path,
    tmp_path: Path,
    stop: Any,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dst = tmp_path / "a.beton"
    for name in ("write", "pwrite"):
        write = getattr(os, name)
        half = partial(
            lambda write, file, data, *at: write(file, data[: -(-len(data) // 2)], *at), write
        )
        monkeypatch.setattr(os, name, half)
    stop(photos, dst, 150, KeyboardInterrupt(), write_mode="raw")
    assert converted(photos, dst, write_mode="raw").before > 20
    assert contents(tmp_path) == whole


def refused(src: Path, dst: Path, **options: Any) -> str:
    before = contents(dst.parent)
    with pytest.raises(ValueError, match="--restart removes its progress") as error:
        converted(src, dst, **options)
    assert contents(dst.parent) == before
    return str(error.value)


def test_other_options_are_named_and_nothing_is_mixed(
    photos: Path, tmp_path: Path, stop: Any, whole: dict[str, bytes]
) -> None:
    dst = tmp_path / "a.beton"
    stop(photos, dst, 100, KeyboardInterrupt(), quality=80)
    said = refused(photos, dst, quality=95, write_mode="jpg")
    assert "--quality was 80 and is 95; --write-mode was 'keep' and is 'jpg'" in said
    report = converted(photos, dst, write_mode="raw", restart=True)
    assert report.before == 0
    assert contents(tmp_path) == whole


def test_a_changed_source_is_refused(tmp_path: Path, stop: Any) -> None:
    src, dst = tmp_path / "photos", tmp_path / "a.beton"
    src.mkdir()
    for i in range(60):
        (src / f"{i:02d}.jpg").write_bytes(photo_bytes(i, 60, 40))
    stop(src, dst, 50, KeyboardInterrupt())
    data = (src / "05.jpg").read_bytes()
    times = os.stat(src / "05.jpg")
    (src / "05.jpg").write_bytes(photo_bytes(99, 60, 40))
    assert "photos have changed since they were read" in refused(src, dst)
    (src / "05.jpg").write_bytes(data)
    os.utime(src / "05.jpg", ns=(times.st_atime_ns, times.st_mtime_ns))
    (src / "new.jpg").write_bytes(data)
    assert "its list of photos has changed" in refused(src, dst)
    (src / "new.jpg").unlink()
    (src / "59.jpg").write_bytes(photo_bytes(99, 60, 40))  # not read yet: no matter
    assert converted(src, dst).before > 0
    assert len(BetonReader(dst)) == 60


def test_a_cut_partial_file_is_refused_and_a_lost_one_begins_anew(
    photos: Path, tmp_path: Path, stop: Any
) -> None:
    dst = tmp_path / "a.beton"
    stop(photos, dst, 100, KeyboardInterrupt())
    os.truncate(partial_path(dst), FIRST_PAGE + 1000)  # inside the first photo
    assert "is shorter than what was written to it" in refused(photos, dst)
    partial_path(dst).unlink()
    assert converted(photos, dst).before == 0
    assert sorted(os.listdir(tmp_path)) == ["a.beton", "a.beton.json"]


def test_an_interrupt_before_it_went_on_loses_nothing(
    photos: Path, tmp_path: Path, stop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = tmp_path / "a.beton"
    stop(photos, dst, 100, KeyboardInterrupt())
    before = contents(tmp_path)

    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "stamp", interrupted)
        with pytest.raises(KeyboardInterrupt):
            converted(photos, dst)
    assert contents(tmp_path) == before
    assert converted(photos, dst).before > 0


def test_faults_on_reading_back_keep_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "MARK_EVERY_S", 0.0)
    monkeypatch.setattr(convert_module, "verify", lambda *_: ["photo 3: wrong"])
    with pytest.raises(RuntimeError, match="1 faults on reading back: photo 3: wrong"):
        converted(photos, tmp_path / "a.beton", verify=True)
    assert os.listdir(tmp_path) == []


def test_marks_stay_small(photos: Path, tmp_path: Path, stop: Any) -> None:
    """A line tells what came since the line before, never all over again."""
    dst = tmp_path / "a.beton"
    stop(photos, dst, 280, KeyboardInterrupt())
    lines = [json.loads(line[9:]) for line in journal_path(dst).read_bytes().splitlines()[1:]]
    assert sum(len(line["sizes"]) for line in lines) <= 280
    assert all(len(line["checksums"]) <= 2 for line in lines)
