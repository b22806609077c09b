"""The picture of losses and k-NN."""

import json
from pathlib import Path
from typing import Any

import pytest

from ibeton.training.log.curves import draw_curves

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("epochs", [[0, 1], [0, 6, 12, 18], [200, 400, 800]])
def test_the_last_label_lies_within_the_axes_and_epochs_are_whole(
    epochs: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot as plt

    losses: list[dict[str, Any]] = [
        {"step": step, "loss": 9.0 - step / 100, "cls": 6.0, "patch": 3.0} for step in range(10)
    ]
    scores = [
        {"step": epoch, "epoch": epoch, "knn_top1": 25 + 75 * epoch / epochs[-1], "knn_k": 20}
        for epoch in epochs
    ]
    lines = (json.dumps(record) for record in losses + scores)
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    assert draw_curves([tmp_path], tmp_path / "curves.png") == tmp_path / "curves.png"
    monkeypatch.undo()
    (figure,) = drawn
    knn = figure.axes[1]
    (label,) = knn.texts
    inside, outside = label.get_window_extent(), knn.get_window_extent()
    assert outside.x0 < inside.x0
    assert inside.x1 <= outside.x1
    assert all(place == round(place) for place in knn.get_xticks())
    plt.close(figure)
