"""What becomes of steps that were skipped because their loss or gradients were no numbers.

The step itself is skipped on the device, see `model.steps`. Here the host, a step later, counts and
decides; all ranks read the same numbers and come to the same decision.
"""

import math
from typing import Any

IN_A_ROW = 4  # skipped steps that make the run go back to its last checkpoint
# Loss scaling halves its scale at each overflow, from 65536 at the start. After so many in a row it
# is the gradients that are broken, not the scale that is too large.
OVERFLOWS_IN_A_ROW = 20


class RunError(RuntimeError):
    """A run cannot go on, for a reason that a sentence tells; its last checkpoint is sound."""


class NonFiniteGuard:
    """Counts skipped steps. `scaled`: under loss scaling, whose own skips are told apart: those
    with a finite loss. `grace`: steps after a trouble within which the next is the same again."""

    def __init__(self, scaled: bool, grace: int) -> None:
        self._scaled, self._grace = scaled, grace
        self.skipped = 0
        self.overflows = 0
        self._in_a_row = 0
        self._overflows_in_a_row = 0
        self.last_bad = -1  # the last step that was skipped
        self._last_trouble: int | None = None

    def update(self, record: dict[str, Any]) -> str:
        """Count the step of `record`, which takes up the counts, and "skipped" with the cause where
        it was skipped. Returns a line to say about it, empty for a good step and an overflow."""
        loss_ok, gradient_ok = math.isfinite(record["loss"]), math.isfinite(record["grad_norm"])
        overflow = self._scaled and loss_ok and not gradient_ok
        bad = not (loss_ok and gradient_ok) and not overflow
        self.overflows += overflow
        self.skipped += bad
        self._overflows_in_a_row = self._overflows_in_a_row + 1 if overflow else 0
        self._in_a_row = self._in_a_row + 1 if bad or (overflow and self._in_a_row) else 0
        record |= {"skipped_steps": self.skipped, "overflows": self.overflows}
        if not bad and not overflow:
            return ""
        what = "overflow" if overflow else "gradient" if loss_ok else "loss"
        record["skipped"], self.last_bad = what, record["step"]
        if overflow:
            return ""
        return (
            f"step {record['step']} is skipped: its {what} is not finite"
            f" ({self.skipped} skipped so far, {self._in_a_row} in a row)"
        )

    def should_roll_back(self) -> bool:
        """Whether it is too much: time to go back."""
        return self._in_a_row >= IN_A_ROW or self._overflows_in_a_row >= OVERFLOWS_IN_A_ROW

    def again(self) -> bool:
        """Whether this trouble is the one from which the run went back before. Asked once a
        trouble, which it remembers."""
        before, self._last_trouble = self._last_trouble, self.last_bad
        return before is not None and self.last_bad <= before + self._grace

    def state(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"skipped": self.skipped, "overflows": self.overflows}

    def restore(self, state: dict[str, int]) -> None:
        """Go on counting from what `state` gave, with no step skipped in a row."""
        self.skipped, self.overflows = state["skipped"], state["overflows"]
        self._in_a_row = self._overflows_in_a_row = 0
