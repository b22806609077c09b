"""A run on several --data: resumed, it is the unbroken run; k-NN is of sets of its own."""

from pathlib import Path

from small_runs import Start, losses, records


def test_a_run_on_a_folder_and_a_beton_resumes_exactly(
    start: Start, tmp_path: Path, tiny: Path, tiny_folder: Path
) -> None:
    photos = ("--data", str(tiny), str(tiny_folder), "--epochs", "2")
    knn = ("--eval-train", str(tiny), "--eval-val", str(tiny_folder), "--eval-every", "1")
    whole = start(tmp_path / "whole", *photos, *knn)
    assert whole.wait() == 0, whole.said()[-3000:]
    assert "128 photos, 16 steps per epoch" in whole.said()
    broken = start(tmp_path / "broken", *photos, *knn, "--stop-after", "19")
    assert broken.wait() == 0, broken.said()[-3000:]
    again = start(tmp_path / "broken", *photos, *knn, "--resume", "auto")
    assert again.wait() == 0, again.said()[-3000:]
    assert losses(again.folder) == losses(whole.folder)
    scores = [[r for r in records(run.folder) if "knn_top1" in r] for run in (again, whole)]
    assert scores[0] == scores[1]
    assert len(scores[0]) == 3


def test_a_resumed_run_refuses_other_sources(
    start: Start, tmp_path: Path, tiny: Path, tiny_folder: Path
) -> None:
    first = start(tmp_path / "run", "--stop-after", "2", "--save-steps", "1")
    assert first.wait() == 0, first.said()[-3000:]
    other = ("--data", str(tiny), str(tiny_folder), "--resume", "auto")
    again = start(tmp_path / "run", *other)
    assert again.wait() == 2
    assert "keep --data and --batch-size" in again.said()
