"""Reads the metrics of a step on the host one step late, so that nothing waits for them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ibeton.stages import StageClock, stage, work

LOGGED = ("loss", "cls", "patch", "teacher_entropy", "prototypes", "acc", "grad_norm", "spread")


class DelayedMetrics:
    """Holds the record of a step until the next step has been queued on the device."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._pending: dict[str, Any] | None = None
        self._names: list[str] = []
        self._values = torch.empty(0)
        self._copied: torch.cuda.Event | None = None

    def enqueue(
        self,
        record: dict[str, Any],
        metrics: dict[str, Tensor],
        clock: StageClock,
        stop: bool = False,
    ) -> None:
        """Keep the `record` of a step with its LOGGED `metrics`, averaged over ranks, the lap of
        `clock` that ends here, the loader's work, and whether this rank wants to `stop`. The photos
        that are "unreadable" in the record are added up over ranks. Call `resolve` for the previous
        step first."""
        self._names = [name for name in LOGGED if name in metrics]
        more = float(record.get("unreadable", 0)), float(stop)
        counts = [torch.full((), value, device=metrics["loss"].device) for value in more]
        values = torch.stack([*(metrics[name].float() for name in self._names), *counts])
        if self._world_size > 1:
            with stage("comm"):
                dist.all_reduce(values)
                values /= self._world_size
        if values.is_cuda:  # reading them directly would wait for all that is queued since
            self._values = torch.empty(len(values), pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._values = values
        self._pending = record | {"parts": clock.lap(), "stage_work": work.take()}

    def resolve(self) -> dict[str, Any] | None:
        """The pending record with its metrics, the seconds of its lap as "parts", the loader's work
        as "stage_work", and whether any rank wants to stop as "stop"; None if none is pending.
        Waits until the device has finished that step. All ranks get the same metrics."""
        if self._pending is None:
            return None
        if self._copied is not None:
            self._copied.synchronize()
        *numbers, unreadable, stop = self._values.tolist()
        record, self._pending = self._pending, None
        record |= dict(zip(self._names, numbers, strict=True))
        if "unreadable" in record:
            record["unreadable"] = round(unreadable * self._world_size)
        return record | {"parts": record["parts"].seconds(), "stop": stop > 0}
