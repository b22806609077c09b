"""Numbers of a step on their way to the host, read a step late so that nothing waits for them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LOGGED = ("loss", "cls", "patch", "teacher_entropy", "acc", "grad_norm")


class LateMetrics:
    """Holds the record of the last step until the next has been queued on the device."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._pending: dict[str, Any] | None = None
        self._values = torch.empty(0)

    def push(self, record: dict[str, Any], metrics: dict[str, Tensor]) -> None:
        """Keep `record` of a step, and of `metrics` the LOGGED ones, averaged over ranks. The step
        before must have been settled."""
        values = torch.stack([metrics[name].float() for name in LOGGED])
        if self._world_size > 1:
            dist.all_reduce(values)
            values /= self._world_size
        self._pending, self._values = record, values

    def settle(self) -> dict[str, Any] | None:
        """The pending record with its numbers, waiting for the device; None where none pends.

        Raises FloatingPointError where the loss is no number, on every rank alike.
        """
        if self._pending is None:
            return None
        numbers = dict(zip(LOGGED, self._values.tolist(), strict=True))
        record, self._pending = self._pending | numbers, None
        if not torch.isfinite(self._values[0]):
            raise FloatingPointError(f"the loss of step {record['step']} is {record['loss']}")
        return record
