"""One process of a group, for the tests to kill, stop and cut off: joins, then adds up numbers with
the others, step by step, under the watchdog.

    python group_member.py FOLDER FAULT LOST_AFTER STALL_AFTER

Writes its step to FOLDER/rankN. FAULT is what rank 1 (or the only one) does at step 3; "short"
is none, and all end there.
"""

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from ibeton.distributed import join_processes
from ibeton.training.health.watchdog import Watchdog

STEPS, FAULT_AT = 400, 3


def loader_that_hangs_on_its_disk() -> None:
    time.sleep(1000)


def step_that_never_ends() -> None:
    time.sleep(1000)


def numbers(fault: str, faulty: bool) -> Iterator[int]:
    for step in itertools.count():
        if faulty and step == FAULT_AT and fault == "loader":
            loader_that_hangs_on_its_disk()
        yield step


def work(rank: int, world_size: int, folder: Path, fault: str, watchdog: Watchdog) -> None:
    faulty = rank == world_size - 1
    for step in watchdog.batches(numbers(fault, faulty), 0):
        if faulty and step == FAULT_AT and fault == "step":
            step_that_never_ends()
        if faulty and step == FAULT_AT and fault == "error":
            raise OSError("the disk is gone")
        if step == FAULT_AT and fault == "short":
            return
        if step == FAULT_AT and fault == "evaluation":
            with watchdog.no_timeout("evaluation"):
                time.sleep(15.0 if rank == 0 else 0.0)
                dist.barrier()
            return
        total = torch.tensor([float(step)])
        if world_size > 1:
            dist.all_reduce(total)
            assert total.item() == step * world_size
        (folder / f"rank{rank}").write_text(str(step))
        time.sleep(0.1)
        if step == STEPS:
            return


def main(folder: str, fault: str, lost_after: str, stall_after: str) -> None:
    _, rank, world_size = join_processes("cpu")
    watchdog = Watchdog(rank, world_size, float(lost_after), float(stall_after))
    with watchdog.report_errors():
        work(rank, world_size, Path(folder), fault, watchdog)
    watchdog.close()
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
