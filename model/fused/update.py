"""The update after a backward by the kernels of `model.kernels.update`, on the state that PyTorch's
optimizer and scaler keep."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ibeton.model.host_inputs import from_host
from ibeton.model.ibot import IBOT
from ibeton.model.kernels.launch import counted, kernels_run_on
from ibeton.model.kernels.update import CHUNK, Settings, Slot, chunk_table, fused_update
from ibeton.model.optim import AdamW, is_last_layer


@lru_cache(maxsize=4)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """The table of chunks, kept from step to step: a graph relies on it."""
    return chunk_table(sizes).to(device)


def _nothing(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """A tensor like `_chunks`, while launches are counted."""
    count = sum(-(-size // CHUNK) for size in sizes)
    return torch.empty(count, 2, dtype=torch.int32, device=device)


class FusedUpdate:
    """Clipping, AdamW, the teacher's average, and the copies of weights in half precision."""

    def __init__(self, ibot: IBOT, optimizer: Optimizer, clip: float) -> None:
        self._ibot, self._optimizer, self._clip = ibot, optimizer, clip

    def runs(self) -> bool:
        """Whether the kernels can take this step: AdamW on float32 tensors that they reach."""
        if not isinstance(self._optimizer, AdamW):
            return False
        tensors: list[Tensor] = list(self._ibot.parameters())
        tensors += [p.grad for p in self._ibot.student.parameters() if p.grad is not None]
        return all(
            kernels_run_on(t) and t.dtype is torch.float32 and t.is_contiguous() for t in tensors
        )

    @torch.no_grad()
    def __call__(
        self, rates: Tensor, scaler: torch.amp.GradScaler | None, frozen: bool
    ) -> tuple[Tensor, Tensor]:
        """Take the step; `rates` float64 [3 or more] are learning rate, weight decay, momentum.
        Returns the norm of all gradients before clipping, and whether nothing changed because it is
        not finite (bool)."""
        optimizer: Any = self._optimizer
        slots = self._slots(frozen)
        device = slots[0].weight.device
        sizes = tuple(slot.weight.numel() for slot in slots)
        rows = [slot.row() for slot in slots]
        beta1, beta2 = optimizer.param_groups[0]["betas"]
        scaling = scaler if scaler is not None and scaler.is_enabled() else None
        norm, found = fused_update(
            slots,
            from_host(lambda: torch.tensor(rows, dtype=torch.int64), device),
            _nothing(sizes, device) if counted() else _chunks(sizes, device),
            rates.to(device),
            None if scaling is None else scaling._scale,
            Settings(beta1, beta2, optimizer.param_groups[0]["eps"], self._clip),
        )
        if scaling is not None:  # as its `unscale_` would have told it
            state = scaling._per_optimizer_states[id(optimizer)]
            state["found_inf_per_device"] = {device: found}
            scaling.update()
        return norm, found.bool()

    def _slots(self, frozen: bool) -> list[Slot]:
        ibot, optimizer = self._ibot, self._optimizer
        teacher, copies = dict(ibot.teacher.named_parameters()), ibot.half_weights.copies
        decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
        slots = []
        for name, weight in ibot.student.named_parameters():
            average, state = teacher.get(name), dict[str, Tensor]()
            if weight.grad is not None and not (frozen and is_last_layer(name)):
                state = self._state(weight)
            slots.append(
                Slot(
                    weight,
                    weight.grad,
                    state.get("exp_avg"),
                    state.get("exp_avg_sq"),
                    state.get("step"),
                    average,
                    copies.get(weight),
                    None if average is None else copies.get(average),
                    id(weight) in decayed,
                )
            )
        return slots

    def _state(self, weight: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a parameter, initialized as AdamW does."""
        state = self._optimizer.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state |= {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        return state
