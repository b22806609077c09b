"""Schedules over training, computed before it starts: float64, as published."""

import numpy as np
from numpy.typing import NDArray


def cosine_schedule(
    base: float,
    final: float,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: int = 0,
) -> NDArray[np.float64]:
    """Value for every step, float64 [epochs * steps_per_epoch].

    Linear from 0 to `base`, both included, then half a cosine towards `final`, which is not
    reached; the peak comes twice (published code, `cosine_scheduler`). Used for learning rate,
    weight decay, and the teacher's momentum.
    Raises ValueError if the warm-up is longer than the run.
    """
    warmup_steps = warmup_epochs * steps_per_epoch
    cosine_steps = epochs * steps_per_epoch - warmup_steps
    if cosine_steps < 0:
        raise ValueError(
            f"a warm-up of {warmup_epochs} epochs does not fit in {epochs}: shorten --warmup-epochs"
        )
    warmup = np.linspace(0.0, base, warmup_steps)
    progress = np.arange(cosine_steps) / max(1, cosine_steps)
    return np.concatenate([warmup, final + 0.5 * (base - final) * (1 + np.cos(np.pi * progress))])


def temperature_schedule(
    start: float, final: float, warmup_epochs: int, epochs: int, start_epoch: int = 0
) -> NDArray[np.float64]:
    """Teacher temperature of every epoch, float64 [epochs].

    `start` for `start_epoch` epochs, then linear to `final`, both included, over `warmup_epochs`,
    then `final` (published code, `iBOTLoss`; patches alone have a start epoch).
    Raises ValueError if that is longer than the run.
    """
    constant = epochs - warmup_epochs - start_epoch
    if constant < 0:
        raise ValueError(
            f"a temperature warm-up of {warmup_epochs} epochs from epoch {start_epoch} does not fit"
            f" in {epochs} epochs: shorten --warmup-teacher-temp-epochs"
        )
    warmup = np.linspace(start, final, warmup_epochs)
    return np.concatenate([np.full(start_epoch, start), warmup, np.full(constant, final)])
