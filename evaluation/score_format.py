"""How a score is written: each kind with its unit and one number of decimals."""

_COUNTS = ("labels", "clusters", "epoch")
_SETTINGS = ("lr", "strength")
_PERCENT = ("top1", "top5", "acc", "ari", "nmi", "fmi", "chance", "map")


def score_text(name: str, value: float) -> str:
    """Counts as integers, learning rates and strengths as they were given, accuracies and their
    like in percent, all else with two decimals."""
    if name.endswith(_COUNTS):
        return f"{value:,.0f}"
    if name.endswith(_SETTINGS):
        return f"{value:g}"
    return f"{value:.2f} %" if name.endswith(_PERCENT) else f"{value:.2f}"
