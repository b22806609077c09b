"""Joins the group of processes: a plain process, one of torchrun's, or one of SLURM's."""

import datetime
import os
import re
import socket
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout
from torch.nn.parallel import DistributedDataParallel

JOIN_S = 300  # by then all processes must have joined
_TORCHRUN_S = 60  # torchrun's store is there before the processes: otherwise it is gone
# Collectives may then take this long, as rank 0 saves and evaluates alone. The watchdog checks
# meanwhile that the others are alive.
PATIENCE = datetime.timedelta(hours=4)
_LEAVE_S = 60  # a rank waits so long for the others before it leaves
VERDICT = "ibeton/verdict"  # why the group ends; empty while it runs
_PORTS = range(20_000, 30_000)  # below those that Linux gives to outgoing connections


def beat_key(rank: int) -> str:
    """The store's key for heartbeats of `rank`."""
    return f"ibeton/beat/{rank}"


def join_processes(name: str) -> tuple[torch.device, int, int]:
    """Device, rank and number of processes; under torchrun or srun, joins the group.

    `name` is "auto", "cpu", "cuda" or "cuda:N". Raises ValueError, with a sentence for the user,
    for an unavailable device and for a group that is incomplete after JOIN_S.
    """
    device = checked_device(name)
    adopt_slurm(os.environ)
    grouped = "RANK" in os.environ
    if device.type == "cuda":
        device = own_gpu(_number(os.environ, "LOCAL_RANK")) if grouped else device
        make_current(device)
    if not grouped:
        return device, 0, 1
    rank, world_size = (_number(os.environ, name) for name in ("RANK", "WORLD_SIZE"))
    store = meet(rank, world_size)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(seconds=JOIN_S),
        world_size=world_size,
        rank=rank,
        store=store,
    )
    try:
        here = torch.ones(1, device=device)
        dist.all_reduce(here)  # a network that does not carry shows now
        here.item()
    except RuntimeError as error:
        raise ValueError(
            f"rank {rank} of {world_size} cannot exchange data with the others ({error}): give the"
            " network interface in GLOO_SOCKET_IFNAME (CPU) or NCCL_SOCKET_IFNAME (GPU)"
        ) from error
    _set_pg_timeout(PATIENCE)
    return device, rank, world_size


def leave_group(together: bool = False) -> None:
    """Leave the group of processes, if there is one; `together`: once all ranks do, or after a
    minute.

    gloo may fail, or wait forever, in the last collective of a rank while another one closes its
    connections (pytorch/gloo#155). A barrier does not help, as it would be the last collective: the
    ranks meet at the store.
    """
    if not dist.is_initialized():
        return
    if together:
        left = [f"ibeton/left/{rank}" for rank in range(dist.get_world_size())]
        try:
            store = _get_default_store()
            store.set(left[dist.get_rank()], "")
            store.wait(left, datetime.timedelta(seconds=_LEAVE_S))
        except RuntimeError:
            pass  # another rank, perhaps with the store, is gone
    dist.destroy_process_group()


def without_reduction(module: Any) -> AbstractContextManager[None]:
    """Gradients that a DDP `module` gets in it stay on this rank until the next backward outside
    it."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def rank_and_size() -> tuple[int, int]:
    """This process's rank, and how many processes its group has; 0 and 1 without a group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def from_rank_0(action: Callable[[], Any], device: torch.device | None = None) -> Any:
    """What `action()` returns on rank 0, on every rank; a ValueError or OSError of it is raised on
    every rank. All ranks must call it. `device`: by which it is sent, the GPU of the group where it
    has one."""
    rank, world_size = rank_and_size()
    box: list[Any] = [None, None]
    if rank == 0:
        try:
            box[0] = action()
        except (ValueError, OSError) as error:
            box[1] = error
    if world_size > 1:
        dist.broadcast_object_list(box, device=device)
    if box[1] is not None:
        raise box[1]
    return box[0]


def union_of_ranks(own: dict[Any, Any]) -> dict[Any, Any]:
    """The entries that any rank has. All ranks must call it."""
    parts = [own] * rank_and_size()[1]
    if len(parts) > 1:
        dist.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def checked_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one. Raises ValueError, with a sentence,
    if it is unknown or unavailable."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: expected cpu, cuda, cuda:N or auto")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ValueError(f"--device {name}: no CUDA device is usable here; use --device cpu")
        if (device.index or 0) >= count:
            raise ValueError(f"--device {name}: the last GPU here is cuda:{count - 1}")
    return device


def make_current(device: torch.device) -> None:
    """Make a GPU the current one: kernels are launched and events recorded there, whatever the
    tensors' is. Nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)


def own_gpu(local_rank: int) -> torch.device:
    """The GPU of process `local_rank` on this machine. SLURM may show each process only its own
    GPU. Raises ValueError if there are too few."""
    count = torch.cuda.device_count()
    if count > 1 and local_rank >= count:
        raise ValueError(
            f"process {local_rank} of this machine finds {count} GPUs: start one process per GPU"
            " (torchrun --nproc_per_node, srun --ntasks-per-node)"
        )
    return torch.device("cuda", local_rank if count > 1 else 0)


def adopt_slurm(environ: MutableMapping[str, str]) -> None:
    """Translate srun's variables to torchrun's: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT.

    Does nothing under torchrun, nor if srun started one task or none. The address is the first
    machine of the step; the port follows from the ids of job and step, so that all tasks agree.
    Both can be set by the user. Raises ValueError if SLURM's variables are incomplete.
    """
    if "RANK" in environ or "SLURM_PROCID" not in environ:
        return
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    if _number(environ, tasks, "1") == 1:
        return
    nodes = [environ[name] for name in _NODE_LISTS if environ.get(name)]
    if not nodes and "MASTER_ADDR" not in environ:
        raise ValueError(f"{tasks} is set, {_NODE_LISTS[-1]} is not: start with torchrun, or srun")
    job, step = _number(environ, "SLURM_JOB_ID", "0"), _number(environ, "SLURM_STEP_ID", "0")
    words = {
        "RANK": str(_number(environ, "SLURM_PROCID")),
        "WORLD_SIZE": str(_number(environ, tasks)),
        "LOCAL_RANK": str(_number(environ, "SLURM_LOCALID")),
    }
    environ.setdefault("MASTER_ADDR", first_node(nodes[0]) if nodes else "")
    environ.setdefault("MASTER_PORT", str(_PORTS[(job * 16 + step) % len(_PORTS)]))
    environ.update(words)


_NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")


def first_node(nodes: str) -> str:
    """The first host of a SLURM list: gpu[07-09,12],login1 -> gpu07."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodes).split(",")[0]


def _number(environ: Mapping[str, str], name: str, default: str = "") -> int:
    value = environ.get(name, default)
    if not value.isdecimal():
        what = f"is {value!r}, expected a number" if value else "is not set"
        raise ValueError(f"{name} {what}: start with torchrun, or srun")
    return int(value)


def address() -> tuple[str, int]:
    """Host and port of the group's store, which torchrun or rank 0 serves. Raises ValueError if
    they are not set."""
    if not os.environ.get("MASTER_ADDR"):
        raise ValueError("RANK is set, MASTER_ADDR is not: start with torchrun, or srun")
    return os.environ["MASTER_ADDR"], _number(os.environ, "MASTER_PORT")


def serves_store(rank: int) -> bool:
    """Whether the store runs in this process; torchrun has its own."""
    return rank == 0 and not _torchrun_serves()


def _torchrun_serves() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def connect(rank: int, serve: bool = False) -> dist.Store:
    """A connection to the store, which this process starts if `serve`. Raises ValueError if there
    is none within JOIN_S, or within _TORCHRUN_S of torchrun's."""
    host, port = address()
    wait_s = JOIN_S if serve or not _torchrun_serves() else _TORCHRUN_S
    patience = datetime.timedelta(seconds=wait_s)
    try:
        store = dist.TCPStore(host, port, None, serve, timeout=patience, wait_for_workers=False)
    except RuntimeError as error:
        trouble = (
            f"rank 0 cannot listen at {host}:{port}; set MASTER_PORT to a free port"
            if serve
            else f"rank {rank} cannot reach rank 0 at {host}:{port} within {wait_s} s; is it"
            " running, and MASTER_ADDR right?"
        )
        raise ValueError(f"{trouble} ({str(error).splitlines()[0]})") from error
    # torchrun keeps its store when it starts the processes again, with what the dead ones wrote.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt_{attempt}", store)


def meet(rank: int, world_size: int) -> dist.Store:
    """The store, once all ranks have joined it. Raises ValueError after JOIN_S, naming those that
    have not."""
    store = connect(rank, serves_store(rank))
    if rank == 0:
        store.set(VERDICT, "")
    store.set(beat_key(rank), f'{{"host": "{socket.gethostname()}"}}')
    everyone = range(world_size)
    try:
        store.wait([beat_key(r) for r in everyone], datetime.timedelta(seconds=JOIN_S))
    except RuntimeError as error:
        missing = ", ".join(str(r) for r in everyone if not store.check([beat_key(r)]))
        host, port = address()
        raise ValueError(
            f"rank {rank} of {world_size} waited {JOIN_S} s at {host}:{port}, and rank {missing}"
            " did not join: check their machines (in a SLURM batch script, `srun python train.py`"
            " starts all of them)"
        ) from error
    return store
