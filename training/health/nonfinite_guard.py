"""Rolls back after repeated skipped steps; ignores single ones.

A step with a non-finite loss or gradient is skipped on the device, see `model.steps`. The host
reads its metrics one step later and decides here. All ranks read the same metrics and therefore
take the same decision.
"""

import math
from typing import Any

from ibeton.command import Failure

IN_A_ROW = 4  # skipped steps that trigger a rollback
# Each overflow halves the loss scale, which starts at 65536. After this many in a row the scale
# cannot be the cause.
OVERFLOWS_IN_A_ROW = 20
AGAIN_WITHIN = 1000  # steps after a rollback in which skipped steps count as the same failure
# Plausible steps in a row after an implausible one: a diverging loss passes zero too
RECOVERED = 10
_PLAUSIBLE = 1.5  # times the larger of the uniform loss and the loss of the run's first step


class RunError(Failure):
    """A run cannot continue."""


class NonFiniteGuard:
    """Counts skipped steps and remembers the last good one.

    `scaled`: whether loss scaling is on; its overflows (finite loss, non-finite gradients) are
    counted separately. `uniform`: the loss of a uniform prediction; inf if every finite loss is
    plausible. A step is good if loss and gradients are finite, the loss is plausible, some gradient
    is not zero, and that held for the last RECOVERED steps if it ever did not. A diverging run has
    finite but implausible losses before the first NaN; checkpoints saved then are useless.
    """

    def __init__(self, scaled: bool, uniform: float = math.inf) -> None:
        self._scaled, self._uniform = scaled, uniform
        self.skipped = 0
        self.overflows = 0
        self.first_loss: float | None = None  # of the whole run
        self._last_trouble = -math.inf
        self._last_target = 0
        self.restore({}, 0)

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Continue at `step` from a `state()`, without a streak of skipped steps."""
        self.skipped = state.get("skipped", self.skipped)
        self.overflows = state.get("overflows", self.overflows)
        self.first_loss = state.get("first_loss", self.first_loss)
        self.start = step
        self.last_good = -1  # the last good step since `start`
        self.first_bad = self.last_bad = -1  # the ends of the current or last streak
        self._in_a_row = self._overflows_in_a_row = 0
        self._spoiled = False
        self._unsettled = 0  # plausible steps still to come until a step is good

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        counts = {"skipped": self.skipped, "overflows": self.overflows}
        return counts if self.first_loss is None else counts | {"first_loss": self.first_loss}

    def update(self, record: dict[str, Any]) -> str:
        """Judge the step of `record`; adds "skipped_steps", "overflows" and, if it was skipped,
        "skipped" with the cause. Returns a line for the user, "" for a good step or an overflow."""
        step, loss, norm = record["step"], record["loss"], record["grad_norm"]
        loss_ok, gradient_ok = math.isfinite(loss), math.isfinite(norm)
        overflow = self._scaled and loss_ok and not gradient_ok
        bad = not (loss_ok and gradient_ok) and not overflow
        self.overflows += overflow
        self.skipped += bad
        first = not (self._spoiled or self._in_a_row or self._overflows_in_a_row)
        self._overflows_in_a_row = self._overflows_in_a_row + 1 if overflow else 0
        self._in_a_row = self._in_a_row + 1 if bad or (overflow and self._in_a_row) else 0
        record |= {"skipped_steps": self.skipped, "overflows": self.overflows}
        if step == 0 and not bad:  # it may overflow, with the first scale
            self.first_loss = loss
        if not bad and not overflow:
            most = _PLAUSIBLE * max(self._uniform, self.first_loss or 0.0)
            plausible = loss <= most and norm > 0
            self._unsettled = max(0, self._unsettled - 1) if plausible else RECOVERED
            if not self._unsettled:
                self.last_good = step
            return ""
        if first:
            self.first_bad = step
        what = "overflow" if overflow else "gradient" if loss_ok else "loss"
        record["skipped"], self.last_bad = what, step
        if overflow:
            return ""
        return (
            f"step {step} is skipped: its {what} is not finite"
            f" ({self.skipped} skipped so far, {self._in_a_row} in a row)"
        )

    def spoil(self, step: int) -> None:
        """Report that weights or optimizer state are non-finite after `step`."""
        self.first_bad = self.last_bad = step
        self._spoiled = True

    @property
    def in_streak(self) -> bool:
        """Whether the last steps were skipped. If so, nothing may be saved."""
        return self._spoiled or self._in_a_row > 0 or self._overflows_in_a_row >= IN_A_ROW

    def should_roll_back(self) -> bool:
        """Whether the run must return to a checkpoint."""
        return (
            self._spoiled
            or self._in_a_row >= IN_A_ROW
            or self._overflows_in_a_row >= OVERFLOWS_IN_A_ROW
        )

    def diverging_since(self) -> int | None:
        """The first finite but implausible step before the streak; None if there was none."""
        since = max(self.last_good + 1, self.start)
        return since if since < self.first_bad else None

    def rolled_back_before(self) -> bool:
        """Whether a recent rollback has already failed to help."""
        return self.last_bad <= self._last_trouble + AGAIN_WITHIN

    def newest_target(self) -> int:
        """The highest step of a checkpoint to roll back to: one followed by a good step, or else
        one older than the checkpoint at which this process started; and older than the last target
        if that did not help."""
        limit = self.last_good if self.last_good >= self.start else self.start - 1
        return min(limit, self._last_target - 1) if self.rolled_back_before() else limit

    def rolled_back(self, target: int) -> None:
        """Record a rollback to the checkpoint of step `target`."""
        self._last_trouble, self._last_target = self.last_bad, target
