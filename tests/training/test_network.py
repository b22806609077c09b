"""Training over a network: each process in a namespace of its own, with its own address, on one
bridge. One is cut off in mid-run; the others end, say so, and the run goes on from what was saved.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm import ROOT, end, srun_words, start, wait_for
from small_runs import SMALL_MODEL, SMALL_RUN, noise_beton

from ibeton.training.health.watchdog import HUNG

NET = "10.83.7"
SMALL = [*SMALL_MODEL, *SMALL_RUN, "--global-batch-size", "8", "--epochs", "40"]
SMALL += shlex.split("--resume auto --save-steps 5 --lost-after 8 --stall-after 600 --drop-path 0")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def name_of(i: int) -> str:
    return f"ibeton{os.getpid() % 10_000}-{i}"


@pytest.fixture
def machines(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many namespaces on a bridge, machine i at NET.(1 + i)."""
    count, bridge = request.param, f"ibt{os.getpid() % 10_000}"
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2 (apt-get install iproute2)")
    try:
        ip("link", "add", bridge, "type", "bridge")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        ip("link", "set", bridge, "up")
        for i in range(count):
            space, cable = name_of(i), f"{bridge}v{i}"
            ip("netns", "add", space)
            ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", cable, "master", bridge, "up")
            ip("-n", space, "addr", "add", f"{NET}.{1 + i}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield count
    finally:
        for i in range(count):
            subprocess.run(["ip", "netns", "del", name_of(i)], check=False, capture_output=True)
        ip("link", "del", bridge)


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_beton(tmp_path_factory.mktemp("noise"), 64)


def begin(count: int, beton: Path, folder: Path, *options: str) -> list[subprocess.Popen[bytes]]:
    """One task of srun in each namespace, as on `count` machines."""
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "--data", str(beton)]
    command += ["--output-dir", str(folder / "run"), *options]
    members = []
    for i in range(count):
        words = srun_words(i, count, job=1) | {"SLURM_LOCALID": "0"}
        words |= {"MASTER_ADDR": f"{NET}.1", "GLOO_SOCKET_IFNAME": "eth0"}
        inside = ["ip", "netns", "exec", name_of(i), *command]
        members.append(start(inside, folder, f"rank{i}", words))
    return members


def steps(folder: Path) -> list[int]:
    path = folder / "run" / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = (json.loads(line) for line in lines if line.endswith("\n"))
    return [record["step"] for record in whole if "loss" in record]


def said(folder: Path, rank: int) -> str:
    return (folder / f"rank{rank}.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("machines", [2, 4], indirect=True)
def test_a_machine_that_is_cut_off_ends_the_job_which_then_goes_on(
    machines: int, beton: Path, tmp_path: Path
) -> None:
    last = machines - 1
    members = begin(machines, beton, tmp_path)
    try:
        wait_for(lambda: len(steps(tmp_path)) > 7, members)
        ip("-n", name_of(last), "link", "set", "eth0", "down")
        assert [member.wait() for member in members] == [HUNG] * machines
    finally:
        end(members)
    for rank in range(last):
        assert f"rank {last}" in said(tmp_path, rank)
        assert "no heartbeat" in said(tmp_path, rank)
    assert f"rank {last} has had no answer from rank 0 at {NET}.1" in said(tmp_path, last)
    came_to = len(steps(tmp_path))
    ip("-n", name_of(last), "link", "set", "eth0", "up")
    members = begin(machines, beton, tmp_path, "--stop-after", str(came_to + 5))
    try:
        assert [member.wait() for member in members] == [0] * machines, said(tmp_path, 0)
    finally:
        end(members)
    assert "resumed at step" in said(tmp_path, 0)
    assert steps(tmp_path) == list(range(came_to + 5)), "a step was lost or repeated"


@pytest.mark.slow
@pytest.mark.parametrize("machines", [2], indirect=True)
def test_a_rank_of_a_training_that_is_killed_ends_the_job(
    machines: int, beton: Path, tmp_path: Path
) -> None:
    members = begin(machines, beton, tmp_path)
    try:
        wait_for(lambda: len(steps(tmp_path)) > 3, members)
        os.killpg(members[1].pid, signal.SIGKILL)
        assert members[0].wait() == HUNG
    finally:
        end(members)
    assert "rank 1" in said(tmp_path, 0)
    assert "--resume auto" in said(tmp_path, 0)
