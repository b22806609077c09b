"""Values that the host computes anew in every step, such as random draws, and the device reads.

A CUDA graph repeats what the device did, not what the host did. So code that draws or counts on the
host passes its values through `from_host`. Outside a graph that is a plain copy to the device.
Inside, the value gets a tensor of its own, which `HostInputs` fills again before every replay.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from ibeton.model.masking import to_device

_active: "HostInputs | None" = None


class HostInputs:
    """The tensors behind the `from_host` calls of one function, in the order of the calls.

    Run the function inside `recording`, then, before each further run or replay, call `refill`.
    The random numbers are those of an eager run if the random state is set before each of both.
    """

    def __init__(self) -> None:
        self._sources: list[tuple[Callable[[], Tensor], Tensor]] = []
        self._position = 0
        self._repeats, self._captures = False, False
        self._pending: list[tuple[Tensor, Tensor]] = []  # not copied yet

    @contextmanager
    def recording(self, captures: bool = False) -> Iterator[None]:
        """Inside, `from_host` hands out the tensors of this object, with new values.

        `captures`: into a CUDA graph. The tensors must then be those of an earlier recording: a
        graph may use memory that is allocated during its capture for other values before them.
        RuntimeError if there is none, or one of another shape.
        """
        with self._handing_out(captures=captures):
            yield
        for tensor, value in self._pending:  # not part of the graph, or it would copy them forever
            tensor.copy_(to_device(value, tensor.device))
        self._pending.clear()

    def repeating(self) -> AbstractContextManager[None]:
        """Inside, `from_host` hands out the tensors as they are."""
        return self._handing_out(repeats=True)

    @contextmanager
    def _handing_out(self, repeats: bool = False, captures: bool = False) -> Iterator[None]:
        global _active
        self._repeats, self._captures = repeats, captures
        before, _active, self._position = _active, self, 0
        self._pending.clear()
        try:
            yield
        finally:
            _active = before

    def refill(self) -> None:
        """Compute every value again and copy it to the device. The host does not wait."""
        for make, tensor in self._sources:
            tensor.copy_(to_device(make(), tensor.device))

    def next(self, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """The tensor of the next call."""
        position, self._position = self._position, self._position + 1
        if self._repeats:
            return self._sources[position][1]
        value = make()
        known = self._sources[position][1] if position < len(self._sources) else None
        if known is not None and known.shape == value.shape:
            tensor = known
        elif self._captures:
            raise RuntimeError("a capture needs the host's values of the eager step before it")
        else:
            tensor = torch.empty_like(value, device=device)
        self._sources[position : position + 1] = [(make, tensor)]
        if self._captures:
            self._pending.append((tensor, value))
        else:
            tensor.copy_(to_device(value, device))
        return tensor


def from_host(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """`make()`, a tensor on the CPU, on `device`. Inside a CUDA graph `make` runs once per replay,
    so it must not close over values of the step."""
    if _active is None:
        return to_device(make(), device)
    return _active.next(make, device)
