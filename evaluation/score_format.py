"""How a score is written: each kind with its unit and one number of decimals."""

_COUNTS = ("labels", "clusters", "epoch")
_SETTINGS = ("lr", "strength")


def score_text(name: str, value: float) -> str:
    """Counts as integers, learning rates and strengths as they were given, all else in percent."""
    if name.endswith(_COUNTS):
        return f"{value:,.0f}"
    if name.endswith(_SETTINGS):
        return f"{value:g}"
    return f"{value:.2f} %"
