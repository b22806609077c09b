"""Optimizers over the published parameter groups, and what happens to gradients before a step."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

OPTIMIZERS = ("adamw", "sgd", "lars")


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: decayed, and not (biases and all 1-D tensors).

    Tokens, position table and the prototypes' g have more than one dimension, so they decay
    (published code, `get_params_groups`). Only the first group follows the schedule of decay.
    """
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            bias_like = name.endswith(".bias") or parameter.dim() == 1
            (not_decayed if bias_like else decayed).append(parameter)
    return [{"params": decayed}, {"params": not_decayed, "weight_decay": 0.0}]


def build_optimizer(
    student: nn.Module, name: str = "adamw", sharded: bool = False, beta2: float = 0.999
) -> Optimizer:
    """Optimizer of the student. Learning rate and decay are 0 until `training_step` sets them.

    AdamW runs fused, where the parameters are on a CPU or CUDA device: one pass over memory, and
    under a GradScaler it skips an overflown step on the device, without asking the host. `sharded`
    divides state and update among the ranks (ZeRO, Rajbhandari et al. 2020, stage 1), which then
    send each other the weights; it needs the process group, and under a GradScaler it does ask the
    host. `beta2` is AdamW's. Raises ValueError for an unknown name.
    """
    groups = parameter_groups(student)
    kind: type[Optimizer]
    settings: dict[str, Any]
    if name == "adamw":
        fused = all(p.device.type in ("cpu", "cuda") for p in student.parameters())
        kind, settings = torch.optim.AdamW, {"betas": (0.9, beta2), "eps": 1e-8, "fused": fused}
        settings["weight_decay"] = 0.0
    elif name == "sgd":
        kind, settings = torch.optim.SGD, {"momentum": 0.9}
    elif name == "lars":
        kind, settings = LARS, {}
    else:
        raise ValueError(f"--optimizer {name}: expected one of {', '.join(OPTIMIZERS)}")
    if sharded:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # only here: takes seconds

        return ZeroRedundancyOptimizer(groups, kind, lr=0.0, **settings)
    return kind(groups, lr=0.0, **settings)  # type: ignore[call-arg]


def is_sharded(optimizer: Optimizer) -> bool:
    """Whether this rank holds a part of the state only."""
    return hasattr(optimizer, "consolidate_state_dict")


def optimizer_state(optimizer: Optimizer) -> dict[str, Any] | None:
    """The state dict for a checkpoint. That of a sharded optimizer, for which all ranks must ask,
    is an unsharded one's on rank 0, and None on the others."""
    if not is_sharded(optimizer):
        return optimizer.state_dict()
    sharded: Any = optimizer
    sharded.consolidate_state_dict(to=0)
    if dist.get_rank():
        return None
    state = optimizer.state_dict()
    sharded._all_state_dicts = []  # or the whole state would stay on rank 0's CPU
    return state


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Continue from what `optimizer_state` gave, sharded or not, on any number of ranks. AdamW's
    betas stay the optimizer's own: they are settings, not state."""
    own = {name: v for name, v in optimizer.param_groups[0].items() if name == "betas"}
    state = {**state, "param_groups": [{**group, **own} for group in state["param_groups"]]}
    if not is_sharded(optimizer):
        optimizer.load_state_dict(state)
        return
    sharded: Any = optimizer
    optimizer.load_state_dict({**state, "state": dict(state["state"])})  # it empties what it reads
    optimizer.state.clear()  # a second copy: what counts is in `optimizer.optim`
    for parameter, own in sharded.optim.state.items():
        if "step" in own:  # on the CPU by now, where fused AdamW does not look for it
            own["step"] = own["step"].to(parameter.device)


class LARS(Optimizer):
    """SGD with momentum whose step is scaled, tensor by tensor, to `eta` times the weights' norm
    (You et al. 2017, algorithm 1). 1-D tensors are neither decayed nor scaled (published code)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta}
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; parameters without gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)
        return loss

    def _step_one(self, parameter: Tensor, group: dict[str, Any]) -> None:
        update = parameter.grad
        assert update is not None
        if parameter.dim() > 1:
            update = update.add(parameter, alpha=group["weight_decay"])
            weight_norm, update_norm = parameter.norm(), update.norm()
            trust = group["eta"] * weight_norm / update_norm
            # A zero tensor or a zero gradient has no ratio: the step is then taken as it is.
            update = update * torch.where((weight_norm > 0) & (update_norm > 0), trust, 1.0)
        state = self.state[parameter]
        if "mu" not in state:
            state["mu"] = torch.zeros_like(parameter)
        state["mu"].mul_(group["momentum"]).add_(update)
        parameter.add_(state["mu"], alpha=-group["lr"])


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale each gradient, by itself, to an L2 norm of at most `max_norm`; 0 only measures.

    Returns the norms before clipping, [number of gradients], in the order given, on the device:
    nothing waits for it. There is no global norm (published code, `clip_gradients`).
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        raise ValueError("no gradients to clip: call backward first")
    norms = torch.stack(torch._foreach_norm(gradients))
    if max_norm > 0:
        scales = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scales.unbind())
    return norms


def cancel_last_layer_gradients(student: nn.Module, epoch: int, freeze_epochs: int) -> None:
    """In the first `freeze_epochs` epochs, drop the gradients of both last layers, g and v.

    Dropped is None, not zero: the optimizer then skips them wholly, decay, moments and step count
    included (published code, `cancel_gradients_last_layer`).
    """
    if epoch < freeze_epochs:
        for name, parameter in student.named_parameters():
            if "last_layer" in name:
                parameter.grad = None
