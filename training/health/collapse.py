"""Signs of collapse: targets or features that no longer tell one image from another."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROBED = 16  # images of a step whose class tokens are looked at
_NEAR = 0.99  # share of ln(out_dim) from which a loss or an entropy is that of a uniform guess
_ALIKE = 0.02  # spread below which all images look the same to the backbone
_ONE = 1.5  # prototypes of a batch below which all its images share one
_LONGEST, _SHORTEST = 1000, 100  # steps that a sign may last unmentioned


def patience(steps: int, per_epoch: int) -> int:
    """Steps that a sign of collapse has to last in a run of `steps`: 1000, or an epoch if that is
    longer, but no more than a tenth of a short run, and at least 100."""
    return min(max(_LONGEST, per_epoch), max(_SHORTEST, steps // 10))


@torch.no_grad()
def spread(backbone: nn.Module, images: Tensor, dtype: torch.dtype | None) -> Tensor:
    """How far the class tokens of `images` [B, 3, S, S] lie apart, a float32 scalar: standard
    deviation over images of the tokens at length 1, mean over channels, times sqrt(C). 0 where all
    are alike, about 1 where they point everywhere. Needs two images at least, else 0."""
    if len(images) < 2:
        return torch.zeros((), device=images.device)
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
        tokens = backbone(images)[:, 0]
    unit = F.normalize(tokens.float(), dim=1)
    return unit.std(dim=0).mean() * unit.shape[1] ** 0.5


class CollapseAlarm:
    """Looks at the records of a run. Warns, once each time, of a sign that has shown in every
    record for `patience` steps: at the start of a run they are all there, and go."""

    def __init__(self, out_dim: int, lambda1: float, patience: int) -> None:
        self._uniform, self._lambda1, self._patience = math.log(out_dim), lambda1, patience
        self._since: dict[str, int] = {}
        self._warned: set[str] = set()

    def add(self, record: dict[str, Any]) -> list[str]:
        """Warnings about a record with "step", "cls", "teacher_entropy", "prototypes" and
        "spread", to which it adds "cls_share" and "entropy_share", both as shares of ln(out_dim)."""
        record["entropy_share"] = record["teacher_entropy"] / self._uniform
        if self._lambda1:
            record["cls_share"] = record["cls"] / self._lambda1 / self._uniform
        signs = {
            _TARGETS: record["entropy_share"] > _NEAR,
            _SAME: record["prototypes"] < _ONE,
            _GUESS: _NEAR < record.get("cls_share", 0.0) < 2 - _NEAR,
            _FEATURES: record["spread"] < _ALIKE,
        }
        return [
            sign.format(**record, uniform=self._uniform)
            for sign, shows in signs.items()
            if self._lasts(sign, shows, record["step"])
        ]

    def _lasts(self, sign: str, shows: bool, step: int) -> bool:
        """Whether to warn of `sign` now."""
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
