"""Pictures of a run, or of two: loss and k-NN over steps, from log.jsonl."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ibeton.atomic import replacing
from ibeton.training.log.run_log import read_records

_INK, _BLUE, _ORANGE, _GREEN = "#333333", "#2b6cb0", "#c05621", "#2f855a"
_LINES = ("-", "--")  # of the first run and of the second
_ROOM = 1.2  # of the k-NN axis beyond the last epoch, for its label
_HOW_TO_READ = (
    "The class loss cannot fall below the entropy of the teacher's targets. Centering spreads\n"
    "the targets over more prototypes, which raises both. The shaded gap between them is\n"
    "what the student has yet to learn."
)


def plot_curves(folder: Path) -> Path | None:
    """Draw curves.png in the run folder; None if the log has no losses yet, or without
    matplotlib."""
    if find_spec("matplotlib") is None:
        return None
    return draw_curves([folder], folder / "curves.png")


def model_facts(folder: Path, step: int, per_epoch: int) -> dict[str, str]:
    """What a model card says of a run after `step` steps: steps, epochs, the last loss in its log,
    and the k-NN if the network was evaluated at that step."""
    facts = {"trained for": f"{step:,} steps, {step / per_epoch:.4g} epochs"}
    for record in read_records(folder / "log.jsonl"):
        if record["step"] < step and record.get("loss") is not None:
            facts["last loss"] = f"{record['loss']:.4f}"
        if record["step"] == step and "knn_top1" in record:
            facts["k-NN top-1"] = f"{record['knn_top1']:.2f} % (k {record['knn_k']})"
    return facts


def run_names(folders: Sequence[Path]) -> list[str]:
    """A name for each run: that of its folder, or its path if two folders have the same name."""
    names = [folder.name for folder in folders]
    return names if len({*names}) == len(names) else [str(folder) for folder in folders]


def draw_curves(folders: Sequence[Path], path: Path) -> Path | None:
    """Draw the curves of a run, or of two over each other, as a PNG; None if there are none."""
    logs = (list(read_records(folder / "log.jsonl")) for folder in folders)
    runs = dict(zip(run_names(folders), logs, strict=True))
    losses = {name: [r for r in log if r.get("loss") is not None] for name, log in runs.items()}
    scores = {name: [r for r in log if "knn_top1" in r] for name, log in runs.items()}
    if not any(losses.values()):
        return None
    import matplotlib  # only here: takes seconds

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    both = any(scores.values())
    figure, axes = plt.subplots(1, 2 if both else 1, figsize=(11 if both else 6, 4), squeeze=False)
    several = len(runs) > 1
    for name, line in zip(runs, _LINES, strict=False):
        _draw_losses(axes[0][0], losses[name], f" {name}" if several else "", line)
        if scores[name]:
            _draw_scores(axes[0][1], scores[name], name if several else "teacher", line)
        if not several and "teacher_entropy" in losses[name][-1]:
            _draw_floor(axes[0][0], losses[name])
            figure.text(0.02, 0.02, _HOW_TO_READ, color=_INK, fontsize=8)
    axes[0][0].set(title="Loss", xlabel="step", ylabel="nats")
    low, high = axes[0][0].get_ylim()
    axes[0][0].set_ylim(low, high + 0.25 * (high - low))  # room for the legend
    axes[0][0].legend(frameon=False, ncols=2, loc="upper center")
    if both:
        _finish_scores(axes[0][1], [r for log in scores.values() for r in log])
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.tight_layout(rect=(0, 0 if several else 0.13, 1, 1))
    with replacing(path, suffix=".png") as partial:
        figure.savefig(partial, dpi=120)
    plt.close(figure)
    return path


def _draw_losses(axis: Any, records: list[dict[str, Any]], of: str, line: str) -> None:
    steps = [r["step"] for r in records]
    for name, color in (("loss", _INK), ("cls", _BLUE), ("patch", _ORANGE)):
        values = [r.get(name) for r in records]
        if all(value is None for value in values):  # other training than iBOT's has the loss alone
            continue
        axis.plot(steps, values, line, label=f"{name}{of}", color=color, linewidth=1.4)


def _draw_floor(axis: Any, records: list[dict[str, Any]]) -> None:
    """The entropy of the targets below the class loss, and the gap that is left to learn. The class
    loss is drawn with its weight, the entropy without: they meet where lambda1 is 1."""
    known = [r for r in records if r.get("teacher_entropy") is not None]
    steps = [r["step"] for r in known]
    floor, losses = [r["teacher_entropy"] for r in known], [r["cls"] for r in known]
    label = "entropy of the targets"
    axis.plot(steps, floor, ":", color=_BLUE, linewidth=1.4, label=label)
    axis.fill_between(steps, floor, losses, color=_BLUE, alpha=0.15, linewidth=0)


def _draw_scores(axis: Any, records: list[dict[str, Any]], label: str, line: str) -> None:
    epochs, top1 = [r["epoch"] for r in records], [r["knn_top1"] for r in records]
    axis.plot(epochs, top1, line, marker="o", color=_GREEN, label=label)
    if epochs[0] == 0:
        untrained = f"untrained {top1[0]:.1f} %"
        axis.axhline(top1[0], color=_INK, linestyle=":", linewidth=1, label=untrained)
    axis.annotate(f"{top1[-1]:.1f} %", (epochs[-1], top1[-1]), (5, 0), va="center",
                  textcoords="offset points")  # fmt: skip


def _finish_scores(axis: Any, records: list[dict[str, Any]]) -> None:
    """Whole epochs on the axis, and room at its end for the last label."""
    from matplotlib.ticker import MaxNLocator

    axis.set(title=f"k-NN, k = {records[-1]['knn_k']}", xlabel="epoch", ylabel="top-1 in %")
    last = max(max(r["epoch"] for r in records), 1)
    axis.set_xlim(-0.03 * last, _ROOM * last)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, loc="best")
