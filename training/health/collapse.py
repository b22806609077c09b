"""Detects collapse: targets or features that are the same for all images."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROBED = 16  # images per step whose class tokens are compared
_NEAR = 0.99  # share of ln(out_dim) above which a loss or an entropy counts as uniform
_ALIKE = 0.02  # spread below which features count as constant
_ONE = 1.5  # prototypes per step below which all its images share one
_LONGEST, _SHORTEST = 1000, 100  # steps that a sign may last unmentioned


def patience(steps: int, per_epoch: int) -> int:
    """Steps that a sign of collapse has to last in a run of `steps`: 1000, or an epoch if that is
    longer, but no more than a tenth of a short run, and at least 100."""
    return min(max(_LONGEST, per_epoch), max(_SHORTEST, steps // 10))


@torch.no_grad()
def spread(backbone: nn.Module, images: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Spread of the class tokens of `images` [B, 3, S, S], a float32 scalar: the standard deviation
    over images of the L2-normalized tokens, averaged over channels, times sqrt(C). 0 if all tokens
    are equal, about 1 if their directions are random. It takes two images at least."""
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
        tokens = backbone(images)[:, 0]
    unit = F.normalize(tokens.float(), dim=1)
    return unit.std(dim=0).mean() * unit.shape[1] ** 0.5


class CollapseAlarm:
    """Warns once when a sign of collapse has lasted for `patience` steps. All signs show at the
    start of a run and then disappear.

    `images`: in a part of a batch; those of a part of one image may well share a prototype.
    `last_sound` is the last step before the present signs; inf without signs, or if there were some
    from the start on. Checkpoints saved after it must not push out those before.
    """

    def __init__(self, out_dim: int, lambda1: float, patience: int, images: int) -> None:
        self._uniform, self._lambda1, self._patience = math.log(out_dim), lambda1, patience
        self._images = images
        self._since: dict[str, int] = {}
        self._warned: set[str] = set()
        self._previous = math.inf  # the last step without a sign
        self.last_sound = math.inf

    def restore(self, state: dict[str, float]) -> None:
        """Continue from a `state()`."""
        self._since.clear()
        self._previous = state.get("previous", math.inf)
        self.last_sound = state.get("last_sound", math.inf)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"previous": self._previous, "last_sound": self.last_sound}

    def add(self, record: dict[str, Any]) -> list[str]:
        """Warnings for a record with "step", "cls", "teacher_entropy", "prototypes" and, unless a
        process has one image, "spread". Adds "cls_share" and "entropy_share" to it, as shares of
        ln(out_dim)."""
        record["entropy_share"] = record["teacher_entropy"] / self._uniform
        if self._lambda1:
            record["cls_share"] = record["cls"] / self._lambda1 / self._uniform
        signs = {
            _TARGETS: record["entropy_share"] > _NEAR,
            _SAME: self._images > 1 and record["prototypes"] < _ONE,
            _GUESS: _NEAR < record.get("cls_share", 0.0) < 2 - _NEAR,
            _FEATURES: record.get("spread", 1.0) < _ALIKE,
        }
        if not any(signs.values()):
            self._previous, self.last_sound = record["step"], math.inf
        else:
            self.last_sound = self._previous
        stay = (
            f"; checkpoints up to step {self.last_sound} stay" if self.last_sound < math.inf else ""
        )
        return [
            sign.format(**record, uniform=self._uniform) + stay
            for sign, shows in signs.items()
            if self._lasts(sign, shows, record["step"])
        ]

    def _lasts(self, sign: str, shows: bool, step: int) -> bool:
        """Whether to warn of `sign` at this step."""
        if not shows:
            self._since.pop(sign, None)
            self._warned.discard(sign)
            return False
        first = self._since.setdefault(sign, step)
        if sign in self._warned or step - first < self._patience:
            return False
        self._warned.add(sign)
        return True


_TARGETS = (
    "collapse: the teacher's targets are uniform (entropy {teacher_entropy:.3f} of ln(out_dim) ="
    " {uniform:.3f}); try a lower --warmup-teacher-temp and --teacher-temp, or a smaller --lr"
)
_SAME = (
    "collapse: the teacher gives all images the same prototype ({prototypes:.2f} in use); try a"
    " smaller --lr, a higher --teacher-temp, or --center-momentum 0.5"
)
_GUESS = (
    "collapse: the student guesses (cls loss {cls:.3f}, ln(out_dim) is {uniform:.3f}); try a"
    " smaller --lr, more --warmup-epochs, --norm-last-layer or more --freeze-last-layer epochs"
)
_FEATURES = (
    "collapse: all images look alike to the teacher (spread of class tokens {spread:.4f}); try a"
    " smaller --lr or --weight-decay-end, or --momentum-teacher closer to 1, and look at the data"
)
