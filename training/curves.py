"""Plots loss and k-NN accuracy of a run over its steps, from log.jsonl."""

from pathlib import Path

from ibeton.atomic import replacing
from ibeton.training.run_log import read_records

_INK, _BLUE, _ORANGE, _GREEN = "#333333", "#2b6cb0", "#c05621", "#2f855a"


def plot_curves(folder: Path) -> Path | None:
    """Write curves.png in the run folder; returns None if the log has no losses yet."""
    import matplotlib  # only here: takes seconds

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    records = read_records(folder / "log.jsonl")
    losses = [r for r in records if r.get("loss") is not None]
    scores = [r for r in records if "knn_top1" in r]
    if not losses:
        return None
    figure, axes = plt.subplots(
        1, 2 if scores else 1, figsize=(11 if scores else 6, 4), squeeze=False
    )
    left = axes[0][0]
    steps = [r["step"] for r in losses]
    for name, color in (("loss", _INK), ("cls", _BLUE), ("patch", _ORANGE)):
        left.plot(steps, [r[name] for r in losses], label=name, color=color, linewidth=1.4)
    left.set(title="Loss", xlabel="step", ylabel="nats")
    left.legend(frameon=False)
    if scores:
        right = axes[0][1]
        epochs = [r["epoch"] for r in scores]
        top1 = [r["knn_top1"] for r in scores]
        right.plot(epochs, top1, marker="o", color=_GREEN, label="teacher")
        if epochs[0] == 0:
            right.axhline(top1[0], color=_INK, linestyle=":", label=f"untrained {top1[0]:.1f} %")
        right.annotate(
            f"{top1[-1]:.1f} %", (epochs[-1], top1[-1]), (4, 4), textcoords="offset points"
        )
        right.set(title=f"k-NN, k = {scores[-1]['knn_k']}", xlabel="epoch", ylabel="top-1 in %")
        right.legend(frameon=False, loc="center right")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.tight_layout()
    path = folder / "curves.png"
    with replacing(path, suffix=".png") as partial:
        figure.savefig(partial, dpi=120)
    plt.close(figure)
    return path
