"""`python -m pipeline.convert` as a process: exit status, one sentence, and nothing left behind."""

import io
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

from ibeton.pipeline.store.beton import FIRST_PAGE, BetonReader

COMMAND = [sys.executable, "-m", "ibeton.pipeline.convert"]
# The same, but it leaves no mark from which it could be resumed, however slow the machine is, and
# takes more than a minute.
WITHOUT_MARKS = """
import sys, time
from ibeton import progress
from ibeton.pipeline.convert import converter, journal
journal.MARK_EVERY_S = progress._LINE_EVERY_S = float("inf")
append, photos = converter._append, []
def slow(*arguments):
    append(*arguments)
    photos.append(1)
    time.sleep(0.2 if len(photos) > 8 else 0)
converter._append = slow
if __name__ == "__main__":
    sys.exit(converter.main(sys.argv[1:]))
"""


def run(
    *arguments: object, program: list[str] = COMMAND, **options: object
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*program, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def refused(*arguments: object) -> str:
    """The one sentence of a command that was refused with exit status 2."""
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_a_conversion_says_what_it_wrote_and_reads_it_back(
    photo_folder: Path, tmp_path: Path
) -> None:
    dst = tmp_path / "a.beton"
    done = run(photo_folder, dst, "--max-resolution", 100, "--subset", 20, "--verify")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{dst}: 20 photos (")
    assert len(BetonReader(dst)) == 20
    again = run(dst, "--verify", "--workers", 1)
    assert (again.returncode, again.stdout) == (0, f"{dst}: every photo reads as written\n")
    with open(dst, "r+b") as file:
        file.seek(FIRST_PAGE + 500)  # inside the first photo
        byte = file.read(1)[0]
        file.seek(FIRST_PAGE + 500)
        file.write(bytes([byte ^ 1]))
    again = run(dst, "--verify", "--workers", 1)
    assert again.returncode == 1
    assert "photos 0 to 19 are not as they were written" in again.stdout


def test_bad_sources_are_refused_in_one_sentence(tmp_path: Path) -> None:
    dst = tmp_path / "a.beton"
    assert "does not exist; give a folder of photos or a tar" in refused(tmp_path / "no", dst)
    (tmp_path / "empty").mkdir()
    assert "holds no photos" in refused(tmp_path / "empty", dst)
    for i in range(3):
        (tmp_path / "empty" / f"{i}.jpg").write_bytes(b"text")
    said = refused(tmp_path / "empty", dst)
    assert "none of 3 photos is readable (0.jpg: not an image format" in said
    assert os.listdir(tmp_path) == ["empty"]


def test_bad_destinations_are_refused_in_one_sentence(photo_folder: Path, tmp_path: Path) -> None:
    assert "make it first" in refused(photo_folder, tmp_path / "no" / "a.beton")
    assert "must end in .beton" in refused(photo_folder, tmp_path / "a.ffcv")
    assert "DST is missing" in refused(photo_folder)
    (tmp_path / "old.beton").write_bytes(b"old")
    assert "--overwrite replaces it" in refused(photo_folder, tmp_path / "old.beton")
    assert (tmp_path / "old.beton").read_bytes() == b"old"
    assert "is not a .beton file" in refused(tmp_path / "old.beton", "--verify")
    assert os.listdir(tmp_path) == ["old.beton"]


def test_a_name_that_leaves_no_room_for_temporary_names_is_refused(
    photo_folder: Path, tmp_path: Path
) -> None:
    most = os.pathconf(tmp_path, "PC_NAME_MAX") - len(".") - len(".json.01234567.partial")
    too_long = "e" * (most - 5) + ".beton"
    said = refused(photo_folder, tmp_path / too_long)
    assert said == f"error: the name {too_long} is too long by 1 byte\n"
    assert refused(photo_folder, tmp_path / ("e" * 300 + ".beton"))
    assert os.listdir(tmp_path) == []
    assert run(photo_folder, tmp_path / too_long[1:], "--subset", 1).returncode == 0


def test_bad_options_are_refused_in_one_sentence(photo_folder: Path, tmp_path: Path) -> None:
    dst = tmp_path / "a.beton"
    assert "--quality 0: expected 1 to 100" in refused(photo_folder, dst, "--quality", 0)
    assert "--write-mode" in refused(photo_folder, dst, "--write-mode", "png")
    assert "--workers" in refused(photo_folder, dst, "--workers", "many")
    assert os.listdir(tmp_path) == []


# ---- stopped on the way ----


@pytest.fixture(scope="module")
def long_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar whose conversion takes far longer than a test waits before it stops it."""
    path = tmp_path_factory.mktemp("long") / "photos.tar"
    coarse = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    photo = io.BytesIO()
    Image.fromarray(coarse).resize((1600, 1200)).save(photo, "JPEG")
    with tarfile.open(path, "w") as tar:
        for i in range(400):
            member = tarfile.TarInfo(f"class{i % 2}/{i}.jpg")
            member.size = photo.getbuffer().nbytes
            photo.seek(0)
            tar.addfile(member, photo)
    return path


def wait_until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.01)


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers_of(pid: int) -> list[int]:
    """Its worker processes, without the helper that Python starts beside them."""
    return [p for p in _children(pid) if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def _own_group_that_hears_ctrl_c() -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the tests may run where it is ignored


@pytest.fixture
def started(long_work: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A conversion under way that replaces tmp_path/a.beton, with two workers."""
    (tmp_path / "a.beton").write_bytes(b"old")
    options = ["--write-mode", "raw", "--workers", "2", "--overwrite"]
    process = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_MARKS, str(long_work), str(tmp_path / "a.beton"), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_own_group_that_hears_ctrl_c,
    )
    yield process
    if not group_is_gone(process.pid):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def partial_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob(".a.beton.partial"))


def assert_only_the_old_file_is_left(folder: Path, group: int) -> None:
    assert os.listdir(folder) == ["a.beton"]
    assert (folder / "a.beton").read_bytes() == b"old"
    wait_until(lambda: group_is_gone(group))


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_leaves_nothing(
    started: subprocess.Popen[str], tmp_path: Path, sign: signal.Signals
) -> None:
    wait_until(lambda: partial_bytes(tmp_path) > FIRST_PAGE)  # photos are being written
    if sign == signal.SIGINT:
        os.killpg(started.pid, sign)  # as a terminal does: to the workers too
    else:
        started.send_signal(sign)
    out, err = started.communicate()
    assert (started.returncode, out, err) == (130, "", "interrupted; nothing was written\n")
    assert_only_the_old_file_is_left(tmp_path, started.pid)


def test_ctrl_c_while_the_workers_start_is_quiet_too(
    started: subprocess.Popen[str], tmp_path: Path
) -> None:
    wait_until(lambda: len(workers_of(started.pid)) > 0)
    os.killpg(started.pid, signal.SIGINT)
    out, err = started.communicate()
    assert (started.returncode, out, err) == (130, "", "interrupted; nothing was written\n")
    assert_only_the_old_file_is_left(tmp_path, started.pid)


def test_a_killed_worker_is_an_error_and_leaves_nothing(
    started: subprocess.Popen[str], tmp_path: Path
) -> None:
    wait_until(lambda: partial_bytes(tmp_path) > FIRST_PAGE)
    os.kill(workers_of(started.pid)[0], signal.SIGKILL)
    out, err = started.communicate()
    assert (started.returncode, out) == (1, "")
    assert err.startswith("error: a worker process died (killed, or out of memory")
    assert err.endswith("; nothing was written\n")
    assert err.count("\n") == 1
    assert_only_the_old_file_is_left(tmp_path, started.pid)


def test_workers_end_with_a_killed_conversion(
    started: subprocess.Popen[str], tmp_path: Path
) -> None:
    wait_until(lambda: partial_bytes(tmp_path) > FIRST_PAGE)
    started.kill()
    wait_until(lambda: group_is_gone(started.pid) or started.poll() is not None)
    started.communicate()  # returns when no worker holds the pipes any more
    wait_until(lambda: group_is_gone(started.pid))


@pytest.mark.parametrize("room", [FIRST_PAGE + 300, FIRST_PAGE + 20_000_000])
def test_a_full_disk_is_an_error_and_leaves_nothing(
    long_work: Path, tmp_path: Path, room: int
) -> None:
    """Full with a small photo in the buffer, or amid large ones."""
    source, mode = long_work, "raw"
    if room < FIRST_PAGE + 1000:
        source, mode = tmp_path / "photos", "keep"
        source.mkdir()
        Image.new("RGB", (8, 8)).save(source / "small.jpg")  # some 600 bytes

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    given = [source, tmp_path / "a.beton", "--write-mode", mode, "--workers", 1]
    program = [sys.executable, "-c", WITHOUT_MARKS]  # a slow disk would see some
    done = run(*given, program=program, preexec_fn=limited)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: [Errno 27] File too large; nothing was written\n"
    assert list(tmp_path.glob("*.beton*")) + list(tmp_path.glob(".*")) == []
