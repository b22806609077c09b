"""Optimizers on the published parameter groups, and clipping and freezing of gradients."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

OPTIMIZERS = ("adamw", "sgd", "lars")


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: with weight decay, and without (biases and all 1-D
    tensors).

    Tokens, the position table, and the prototypes' g have more than one dimension, so they decay
    (published code, `get_params_groups`). Only the first group follows the decay schedule.
    """
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            bias_like = name.endswith(".bias") or parameter.dim() == 1
            (not_decayed if bias_like else decayed).append(parameter)
    return [{"params": decayed}, {"params": not_decayed, "weight_decay": 0.0}]


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, whose weight decay may be a scalar on the device, as its learning rate may.

    Both are then float32, and a CUDA graph of the step follows them. `found_inf`, the attribute by
    which a GradScaler tells fused optimizers to skip a step, skips the decay too. State dicts are
    those of PyTorch's AdamW.
    """

    found_inf: Tensor | None = None

    def _cuda_graph_capture_health_check(self) -> None:
        """Fused steps can be captured; only others need `capturable`."""

    # Its name since torch 2.12
    _accelerator_graph_capture_health_check = _cuda_graph_capture_health_check

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; parameters without a gradient do not change. Returns the closure's loss."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            if isinstance(group["weight_decay"], Tensor):
                self._decay(group)
                group["weight_decay"] = 0.0
        loss = super().step(closure)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        return loss

    def _decay(self, group: dict[str, Any]) -> None:
        """weights -= lr * weight_decay * weights, as a step of SGD whose gradient is the weights:
        a fused update that takes its rate, and whether to skip, from the device."""
        weights = [p for p in group["params"] if p.grad is not None]
        if weights:
            fused_sgd(weights, weights, group["lr"] * group["weight_decay"], self.found_inf)


def fused_sgd(
    weights: list[Tensor],
    gradients: list[Tensor],
    lr: float | Tensor,  # a tensor is a float32 scalar on the device
    found_inf: Tensor | None,  # float32 scalar; not 0: nothing changes
    decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """weights -= lr * (gradients + decay * weights), in place, in one pass over all lists. With
    `maximize` the gradients are negated."""
    torch._fused_sgd_(
        weights,
        gradients,
        [],
        weight_decay=decay,
        momentum=0.0,
        lr=lr,
        dampening=0.0,
        nesterov=False,
        maximize=maximize,
        is_first_step=False,
        found_inf=found_inf,
    )


def build_optimizer(
    student: nn.Module, name: str = "adamw", sharded: bool = False, beta2: float = 0.999
) -> Optimizer:
    """The student's optimizer. Learning rate and decay are 0 until `training_step` sets them.

    AdamW is fused if the parameters are on a CPU or CUDA device: one pass over memory, and steps
    are skipped on the device, without waiting for the host. `sharded` divides state and update
    among the ranks (ZeRO, Rajbhandari et al. 2020, stage 1), which then exchange the weights; it
    needs the process group, and skipping a step makes the host wait. `beta2` is AdamW's. Raises
    ValueError for an unknown name.
    """
    groups = parameter_groups(student)
    kind: type[Optimizer]
    settings: dict[str, Any]
    if name == "adamw":
        fused = all(p.device.type in ("cpu", "cuda") for p in student.parameters())
        kind = torch.optim.AdamW if sharded or not fused else AdamW
        settings = {"betas": (0.9, beta2), "eps": 1e-8, "fused": fused, "weight_decay": 0.0}
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
    """Whether each rank holds only a part of the state."""
    return hasattr(optimizer, "consolidate_state_dict")


def optimizer_state(optimizer: Optimizer) -> dict[str, Any] | None:
    """The state dict for a checkpoint. All ranks must call this for a sharded optimizer: rank 0
    gets the whole state, the others None."""
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
    """Load what `optimizer_state` returned, sharded or not, on any number of ranks. AdamW's betas
    stay the optimizer's own: they are settings, not state."""
    own = {name: v for name, v in optimizer.param_groups[0].items() if name == "betas"}
    state = {**state, "param_groups": [{**group, **own} for group in state["param_groups"]]}
    if not is_sharded(optimizer):
        optimizer.load_state_dict(state)
        return
    sharded: Any = optimizer
    optimizer.load_state_dict({**state, "state": dict(state["state"])})  # it empties its argument
    optimizer.state.clear()  # a second copy: `optimizer.optim` has the state
    for parameter, own in sharded.optim.state.items():
        if "step" in own:  # on the CPU by now, where fused AdamW does not look for it
            own["step"] = own["step"].to(parameter.device)


class LARS(Optimizer):
    """SGD with momentum that scales the step of each tensor to `eta` times the norm of its weights
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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; parameters without a gradient do not change. Returns the closure's loss."""
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
            # With zero weights or gradients there is no ratio: the step is not scaled.
            update = update * torch.where((weight_norm > 0) & (update_norm > 0), trust, 1.0)
        state = self.state[parameter]
        if "mu" not in state:
            state["mu"] = torch.zeros_like(parameter)
        state["mu"].mul_(group["momentum"]).add_(update)
        parameter.add_(state["mu"], alpha=-group["lr"])


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale each gradient on its own to an L2 norm of at most `max_norm`; 0 only measures.

    Returns the norms before clipping, [number of gradients], in the order of the parameters, on
    the device. There is no global norm (published code, `clip_gradients`). Raises ValueError if no
    parameter has a gradient.
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
    """In the first `freeze_epochs` epochs, remove the gradients of both last layers, g and v.

    They become None, not zero, so the optimizer skips these parameters: no decay, and moments and
    step count do not change (published code, `cancel_gradients_last_layer`).
    """
    if epoch < freeze_epochs:
        for name, parameter in student.named_parameters():
            if is_last_layer(name):
                parameter.grad = None


def is_last_layer(name: str) -> bool:
    """Whether a parameter of that name is frozen in the first epochs."""
    return "last_layer" in name
