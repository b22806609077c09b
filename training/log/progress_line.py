"""The progress line of a run: what is shown of a step, by the width that there is."""

from typing import Any

# Fields in the order in which they stand, and in which they leave a line that is too long.
_ORDER = ("epoch", "step", "loss", "terms", "rate", "wait", "peak", "memory", "eta")
_LEAVE = ("terms", "peak", "step", "memory", "wait", "rate", "eta")


def progress_line(fields: dict[str, str], width: int) -> str:
    """`fields` that fit in `width` columns, two spaces apart; epoch and loss stay in any case."""
    shown = [name for name in _ORDER if name in fields]
    for name in _LEAVE:
        if len("  ".join(fields[n] for n in shown)) <= width:
            break
        if name in shown:
            shown.remove(name)
    return "  ".join(fields[name] for name in shown)


def step_fields(record: dict[str, Any]) -> dict[str, str]:
    """What a line can show of the record of a step. "cls" and "patch" may be missing."""
    terms = [f"{name} {record[name]:.3f}" for name in ("cls", "patch") if name in record]
    fields = {
        "loss": f"loss {record['loss']:.3f}",
        "rate": f"{rate(record['images_per_s'])} images/s",
        "wait": f"data wait {record['data_wait']:.0%}",
        "memory": f"{record['memory_gib']:.1f} GiB",
    }
    if terms:
        fields["terms"] = f"({' '.join(terms)})"
    if "peak_share" in record:
        fields["peak"] = f"{record['peak_share']:.0%} of peak"
    return fields


def place_fields(step: int, total: int, per_epoch: int, left: float | None) -> dict[str, str]:
    """Where a run stands: `step` of `total` steps are done, `left` seconds remain (None: it cannot
    be said yet)."""
    fields = {
        "epoch": f"epoch {(step - 1) // per_epoch + 1}/{-(-total // per_epoch)}",
        "step": f"step {step:,}/{total:,}",
    }
    return fields if left is None else {**fields, "eta": f"ETA {clock(left)}"}


def rate(value: float) -> str:
    """Images/s: whole above 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, or days."""
    minutes, s = divmod(round(max(0.0, seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours < 48 else f"{hours / 24:.1f} days"
