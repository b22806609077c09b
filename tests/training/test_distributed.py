"""How processes find each other: what torchrun and srun say, and what if one is missing."""

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from paths import ROOT
from slurm import FIRST_PORT, PORT_STEP, end, free_job, srun_words, start

from ibeton import distributed
from ibeton.distributed import (
    adopt_slurm,
    connect,
    first_node,
    from_rank_0,
    join_processes,
    leave_group,
    meet,
    union_of_ranks,
)

ADOPTED = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}


def adopted(words: dict[str, str]) -> dict[str, str]:
    environ = dict(words)
    adopt_slurm(environ)
    return {name: value for name, value in environ.items() if name in ADOPTED}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("a1,a2", "a1"),
        ("rack[2-3]n[01,05]", "rack2n01"),
        ("node[3-4]-ib.cluster", "node3-ib.cluster"),
    ],
)
def test_first_machine_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_what_srun_says_becomes_what_torchrun_says() -> None:
    words = {**srun_words(5, 8, 4711), "SLURM_STEP_NODELIST": "gpu[3-4]", "SLURM_LOCALID": "1"}
    port = str(20_000 + 4711 * 16 % 10_000)
    assert adopted(words) == {
        **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"},
        **{"MASTER_ADDR": "gpu3", "MASTER_PORT": port},
    }


def test_all_tasks_find_one_address_and_steps_of_a_job_have_their_own() -> None:
    def where(rank: int, step: int) -> str:
        words = adopted({**srun_words(rank, 4, 99), "SLURM_STEP_ID": str(step)})
        return f"{words['MASTER_ADDR']}:{words['MASTER_PORT']}"

    assert len({where(rank, 0) for rank in range(4)}) == 1
    assert where(0, 0) != where(0, 1)


def test_an_address_that_is_given_stands() -> None:
    words = adopted(srun_words(0, 2, 1) | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"})
    assert (words["MASTER_ADDR"], words["MASTER_PORT"]) == ("10.0.0.7", "29500")


def test_the_words_of_old_slurms_do() -> None:
    words = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}
    assert adopted({**words, "SLURM_NODELIST": "n[1-2]"})["MASTER_ADDR"] == "n1"


def test_torchrun_goes_before_slurm() -> None:
    assert adopted({**srun_words(1, 2, 1), "RANK": "7"}) == {"RANK": "7"}


@pytest.mark.parametrize("words", [{}, srun_words(0, 1, 1), {"SLURM_NTASKS": "8"}])
def test_one_task_or_none_is_a_plain_process(words: dict[str, str]) -> None:
    assert adopted(words) == {}


@pytest.mark.parametrize("missing", ["SLURM_LOCALID", "SLURM_STEP_NODELIST"])
def test_half_of_a_slurm_is_refused_and_leaves_nothing_behind(missing: str) -> None:
    environ = srun_words(0, 2, 1)
    del environ[missing]
    before = dict(environ)
    with pytest.raises(ValueError, match="start with torchrun, or srun"):
        adopt_slurm(environ)
    assert environ == before or "RANK" not in environ


def test_two_tasks_of_srun_meet_and_add_up(tmp_path: Path) -> None:
    script = str(ROOT / "tests" / "training" / "group_member.py")
    command = [sys.executable, script, str(tmp_path), "short", "60", "600"]
    job = free_job()
    tasks = [start(command, tmp_path, f"log{r}", srun_words(r, 2, job)) for r in range(2)]
    try:
        assert [task.wait() for task in tasks] == [0, 0], (tmp_path / "log0.log").read_text()
    finally:
        end(tasks)
    assert (tmp_path / "rank1").read_text() == "2"


@pytest.fixture
def store_address(monkeypatch: pytest.MonkeyPatch) -> int:
    """A port that is free, in the environment."""
    port = FIRST_PORT + PORT_STEP * free_job()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(distributed, "JOIN_S", 2)
    return port


def test_ranks_that_do_not_come_are_named(
    store_address: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def patient(*arguments: Any) -> Any:  # it may take longer on a busy machine
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "JOIN_S", 300)
            return connect(*arguments)

    monkeypatch.setattr(distributed, "connect", patient)
    with pytest.raises(ValueError, match=r"rank 0 of 3 waited 2 s .* rank 1, 2 did not join"):
        meet(0, 3)


def test_a_rank_0_that_does_not_come_is_named(store_address: int) -> None:
    with pytest.raises(
        ValueError, match=f"rank 1 cannot reach rank 0 at 127.0.0.1:{store_address}"
    ):
        meet(1, 3)


def test_a_port_in_use_is_named(store_address: int) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", store_address))
        other.listen()
        with pytest.raises(ValueError, match="set MASTER_PORT to a free port"):
            connect(0, serve=True)


def _asks(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)

    def fails() -> None:
        raise FileNotFoundError(2, "No such file", "x.pt")

    assert from_rank_0(lambda: rank) == 0
    with pytest.raises(FileNotFoundError, match=r"x\.pt"):
        from_rank_0(fails)
    assert from_rank_0(lambda: 7) == 7
    (folder / str(rank)).touch()
    leave_group(together=True)


def test_what_rank_0_cannot_do_is_an_error_of_every_rank(tmp_path: Path) -> None:
    mp.spawn(_asks, args=(tmp_path,), nprocs=2)
    assert (tmp_path / "0").exists()
    assert (tmp_path / "1").exists()


def test_a_restart_by_torchrun_does_not_read_what_the_dead_processes_wrote(
    store_address: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = connect(0, serve=True)
    first.set("beat", "dead")
    assert connect(1).get("beat") == b"dead"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not connect(1).check(["beat"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x', expected a number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
    ],
)
def test_what_a_launcher_forgot_is_named(
    words: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ADOPTED:
        monkeypatch.delenv(name, raising=False)
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=says):
        join_processes("cpu")


@pytest.mark.parametrize(
    ("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)]
)
def test_the_gpu_that_is_asked_for_becomes_the_current_one(
    name: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches on the current device, whatever the tensors' is."""
    chosen: list[int] = []

    def set_device(device: Any) -> None:
        chosen.append(torch.cuda._utils._get_device_index(device))  # as PyTorch's, or it raises

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    device, rank, world_size = join_processes(name)
    assert (device.type, rank, world_size) == ("cuda", 0, 1)
    assert chosen == [index]


def _tells(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    assert union_of_ranks({rank: "own", 7: "both"}) == {0: "own", 1: "own", 7: "both"}
    (folder / str(rank)).touch()
    leave_group(together=True)


def test_what_any_rank_has_is_known_to_all(tmp_path: Path) -> None:
    assert union_of_ranks({3: "alone"}) == {3: "alone"}
    mp.spawn(_tells, args=(tmp_path,), nprocs=2)
    assert (tmp_path / "0").exists()
    assert (tmp_path / "1").exists()
