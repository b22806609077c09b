"""Fine-tuning as people run it: it learns, is killed and resumes, runs on two processes, and says
in one sentence what it cannot do."""

import gc
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from photo_folders import COLORS, new_classifier, write_photos
from run_processes import two_ranks
from small_runs import HOLD

from ibeton.evaluation.finetune import run
from ibeton.evaluation.finetune.__main__ import main
from ibeton.evaluation.finetune.classifier import build_classifier, load_classifier
from ibeton.evaluation.finetune.score import hits, score
from ibeton.evaluation.finetune.sets import open_labeled
from ibeton.evaluation.frozen.features import Extraction
from ibeton.evaluation.photos import PhotoViews, bilinear_view
from ibeton.model.checkpoint import load_checkpoint, save_checkpoint

STEPS_PER_EPOCH = 3
STEPS = 4 * STEPS_PER_EPOCH


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, the optimizer's and the average's too."""
    content = load_checkpoint(folder / "checkpoint.pt")
    found = {**content["teacher"], **content["classifier"]}
    found |= {f"ema.{k}": v for k, v in (content["ema"] or {}).items()}
    for i, state in content["optimizer"]["state"].items():
        found |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    return found


def losses(folder: Path) -> list[tuple[int, float, float]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["lr"]) for r in records if "loss" in r]


def scores(folder: Path, task: str = "finetune") -> dict[str, float]:
    return json.loads((folder / "finetune.json").read_text())["scores"]["teacher"][task]


def test_it_learns_and_leaves_a_classifier_that_scores_what_it_says(given, tmp_path, capsys):
    options = ("--epochs", "8", "--mixup", "0", "--cutmix", "0", "--erasing", "0", "--augment", "")
    assert main(given(tmp_path / "run", *options, "--lr", "2e-3", "--layer-decay", "1")) == 0
    said = capsys.readouterr().out
    found = scores(tmp_path / "run")
    assert found["top1"] >= 80
    assert f"top-1 {found['top1']:.2f} % after 8 epochs" in said
    assert "data wait" in said
    assert "recipe imagenet with --checkpoint" in said
    assert not any(line.startswith(("{", "}")) for line in said.splitlines())
    classifier, classes, settings = load_classifier(tmp_path / "run" / "checkpoint.pt")
    assert classes == sorted(COLORS)
    sets = open_labeled(settings["train"], settings["val"])
    views = PhotoViews(sets.val, settings["image_size"], bilinear_view)
    (again,) = score([classifier], views, Extraction(batch_size=4))
    assert again["top1"] == found["top1"]
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    assert best["scores"][-1]["epoch"] == found["best_epoch"]
    assert best["scores"][-1]["top1"] == found["best_top1"]


EVERYTHING = ("--ema", "0.9", "--save-steps", "1", "--resume", "auto")


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_at_random_steps_and_resumed_it_ends_bit_equal(kills, start, tmp_path):
    whole, broken, draws = tmp_path / "whole", tmp_path / "broken", random.Random(0)
    assert start(whole, *EVERYTHING).wait() == 0
    for i in range(kills):
        process = start(broken, *EVERYTHING, fault=HOLD.format(step=STEPS - 1))
        process.until_step(min(STEPS - 2, (i + 1) * STEPS // (kills + 1) - draws.randrange(2)))
        time.sleep(draws.uniform(0, 0.05))
        process.kill()
        assert process.wait() == -1
    last = start(broken, *EVERYTHING, "--workers", "3")
    assert last.wait() == 0, last.said()[-3000:]
    assert losses(broken) == losses(whole)
    assert [step for step, *_ in losses(broken)] == list(range(STEPS))
    one, other = weights(broken), weights(whole)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert scores(broken) == scores(whole)
    assert not list(broken.glob(".*.partial"))


def test_a_finished_run_is_told_again_and_not_trained_again(given, tmp_path):
    options = given(tmp_path / "run", "--epochs", "1", "--resume", "auto")
    assert main(options) == 0
    before = scores(tmp_path / "run")
    (tmp_path / "run" / "finetune.json").unlink()
    assert main(options) == 0
    assert scores(tmp_path / "run") == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_continues(given, tmp_path, capsys):
    options = given(tmp_path / "run", "--epochs", "2", "--resume", "auto")
    assert main(options) == 0
    newest = tmp_path / "run" / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert main(options) == 0
    said = capsys.readouterr().out
    assert re.search(rf"skipped: .*{re.escape(str(newest))}", said)
    assert f"resumed at step {STEPS_PER_EPOCH} of" in said


def test_two_processes_and_parts_of_a_batch_do_what_one_process_does(start, tmp_path):
    options = ("--drop-path", "0", "--epochs", "2", "--ema", "0.5")
    runs = [start(tmp_path / "two", *options, environment=rank) for rank in two_ranks()]
    runs += [start(tmp_path / "one", *options)]
    runs += [start(tmp_path / "parts", *options, "--accumulate", "2")]
    for process in runs:
        assert process.wait() == 0, process.said()[-3000:]
    one = weights(tmp_path / "one")
    for folder in ("two", "parts"):
        other = weights(tmp_path / folder)
        assert one.keys() == other.keys()
        for (step, loss, lr), (_, expected, rate) in zip(
            losses(tmp_path / folder), losses(tmp_path / "one"), strict=True
        ):
            assert (loss, lr) == pytest.approx((expected, rate), rel=1e-4), (folder, step)
        for name, tensor in one.items():
            if not name.startswith("optimizer"):
                torch.testing.assert_close(other[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
        assert scores(tmp_path / folder)["top1"] == pytest.approx(
            scores(tmp_path / "one")["top1"],
            abs=12,  # one photo of nine
        )


def test_a_request_to_stop_is_heard_after_the_step_and_the_run_saves(start, tmp_path):
    process = start(tmp_path / "run", "--epochs", "40000")
    process.until_step(2)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 85
    assert "stopped (SIGTERM)" in process.said()
    content = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert 3 <= content["step"] < 40_000 * STEPS_PER_EPOCH
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "stopped"


def test_a_sweep_runs_each_rate_and_reports_the_best(given, tmp_path, capsys):
    folder = tmp_path / "sweep"
    options = given(folder, "--epochs", "2", "--sweep", "1e-9", "3e-3", "--resume", "auto")
    assert main(options) == 0
    report = json.loads((folder / "finetune.json").read_text())
    tried = report["sweep"]
    assert set(tried) == {"1e-09", "0.003"}
    assert report["scores"]["teacher"]["finetune"]["top1"] == max(tried.values())
    assert "(best)" in capsys.readouterr().out
    for rate, top1 in tried.items():
        assert scores(folder / f"lr-{rate}")["top1"] == top1


def test_a_rate_that_diverges_is_noted_and_the_next_one_tried(given, tmp_path, capsys):
    folder = tmp_path / "sweep"
    assert main(given(folder, "--epochs", "4", "--sweep", "1e9", "3e-3")) == 0
    report = json.loads((folder / "finetune.json").read_text())
    assert report["sweep"] == {"1e+09": None, "0.003": scores(folder)["top1"]}
    said = capsys.readouterr()
    assert "| 1e+09 | diverged |\n| 0.003 | " in said.out
    assert "lower --lr" in said.err
    assert main(given(tmp_path / "none", "--sweep", "1e9", "1e8")) == 1
    assert "| 1e+09 | diverged |\n| 1e+08 | diverged |" in capsys.readouterr().out
    assert not (tmp_path / "none" / "finetune.json").exists()


def test_two_processes_go_on_to_the_next_rate_too(start, tmp_path):
    folder = tmp_path / "sweep"
    options = ("--sweep", "1e9", "3e-3")
    for process in [start(folder, *options, environment=rank) for rank in two_ranks()]:
        assert process.wait() == 0, process.said()[-3000:]
    assert json.loads((folder / "finetune.json").read_text())["sweep"]["1e+09"] is None


def test_a_failure_of_one_rank_ends_the_sweep_of_all(start, tmp_path):
    fault = """
from ibeton.evaluation.finetune import train
from ibeton.training.health.nonfinite_guard import RunError
def full(*arguments):
    raise RunError("no checkpoint could be written (No space left on device)")
train.save = full
"""
    first, second = two_ranks()
    options = ("--sweep", "1e-3", "3e-3")
    ranks = [
        start(tmp_path / "run", *options, environment=first, fault=fault),
        start(tmp_path / "run", *options, environment=second),
    ]
    assert ranks[0].wait() == 1, ranks[0].said()[-3000:]
    assert ranks[1].wait() != 0
    assert "No space left on device" in ranks[0].said()
    assert not (tmp_path / "run" / "lr-0.003").exists(), "the next rate"


def test_a_sweep_holds_one_run_at_a_time(given, tmp_path, monkeypatch):
    """Two at a time may not fit the GPU."""
    held: list[weakref.ref] = []
    before = []

    def counted(*arguments):
        gc.collect()
        before.append(sum(one() is not None for one in held))
        classifier = build_classifier(*arguments)
        held.append(weakref.ref(classifier))
        return classifier

    monkeypatch.setattr(run, "build_classifier", counted)
    options = ("--epochs", "1", "--warmup-epochs", "0", "--ema", "0.9", "--sweep", "1e-3", "2e-3")
    assert main(given(tmp_path / "sweep", *options)) == 0
    assert before == [0, 0]


def test_weights_and_their_average_see_photos_that_are_decoded_once(folders, checkpoint):
    sets = open_labeled(*folders)
    read = []

    def view(image, size):
        read.append(1)
        return bilinear_view(image, size)

    classifiers = [new_classifier(checkpoint, 3, seed=seed) for seed in (0, 1)]
    views, how = PhotoViews(sets.val, 32, view), Extraction(batch_size=4)
    both = score(classifiers, views, how)
    assert len(read) == len(views)
    assert both == [*score(classifiers[:1], views, how), *score(classifiers[1:], views, how)]


def test_ranks_that_end_well_leave_their_group_together(given, tmp_path, monkeypatch):
    """As gloo may fail in a rank whose last collective is under way, see `leave_group`."""
    together = []
    command = sys.modules[main.__module__]
    monkeypatch.setattr(command, "leave_group", lambda **how: together.append(how))
    short = ("--epochs", "1", "--warmup-epochs", "0")
    assert main(given(tmp_path / "run", *short)) == 0
    assert main(given(tmp_path / "stopped", *short, "--max-hours", "1e-9")) == 85
    assert main(given(tmp_path / "refused", "--lr", "0")) == 2
    assert together == [{"together": True}, {"together": True}, {"together": False}]


def test_few_labels_and_the_projection_layer_take_part(given, tmp_path):
    recipe = ("--recipe", "semi", "--labels", "0.5", "--epochs", "2", "--warmup-epochs", "0")
    assert main(given(tmp_path / "run", *recipe)) == 0
    found = scores(tmp_path / "run", "semi_0.5")
    assert found["photos"] == 12
    assert "ema_top1" in found
    content = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert content["classifier"]["neck.0.weight"].shape == (16, 32)
    assert content["finetune"]["label_seed"] == 0


def test_hits_count_the_first_and_the_first_five():
    logits = torch.tensor([[3.0, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1]])
    assert hits(logits, torch.tensor([0, 0, 1])).tolist() == [1, 2]


def unlike(checkpoint: Path, path: Path) -> Path:
    """A checkpoint whose settings tell of another architecture than its tensors."""
    content = load_checkpoint(checkpoint)
    content["config"] = {**content["config"], "depth": 3}
    save_checkpoint(path, content)
    return path


@pytest.mark.parametrize(
    ("also", "says"),
    [
        (["--batch-size", "1000"], "--batch-size 1000 is more than the 24 photos"),
        (["--batch-size", "9"], "--mix-images"),
        (["--accumulate", "3"], "3 parts"),
        (["--image-size", "33"], "--image-size 33"),
        (["--precision", "fp16"], "--precision fp16"),
        (["--lr", "0"], "--lr"),
        (["--warmup-epochs", "9"], "--warmup-epochs 9"),
        (["--augment", "none"], "--augment none"),
        (["--root", "x"], "--dataset"),
        (["--labels", "0"], "above 0"),
        (["--labels", "none.txt"], "none.txt"),
        (["--network", "student", "--checkpoint", "missing.pt"], "missing.pt"),
        (["--sweep", "1e-3", "1e-3"], "--sweep"),
    ],
)
def test_options_that_cannot_work_are_refused(also, says, given, refused, tmp_path):
    assert says in refused(given(tmp_path / "run", *also), tmp_path / "run")


def test_all_options_that_cannot_work_are_refused_at_once(given, tmp_path, capsys):
    bad = ("--lr", "0", "--warmup-epochs", "9", "--erasing", "2", "--scale", "0.5", "0.1")
    assert main(given(tmp_path / "run", *bad, "--batch-size", "0")) == 2
    _, *errors = capsys.readouterr().err.strip().splitlines()
    assert all(line.startswith("error: --") for line in errors)
    assert {line.split()[1].rstrip(":") for line in errors} == {
        *("--lr", "--warmup-epochs", "--erasing", "--scale", "--batch-size")
    }


def test_other_checkpoints_and_folders_are_refused(given, refused, checkpoint, tmp_path):
    run = tmp_path / "run"
    said = refused(given(run, "--checkpoint", unlike(checkpoint, tmp_path / "deep.pt")), run)
    assert "deep.pt: backbone of vit_s does not fit" in said
    content = load_checkpoint(checkpoint)
    backbone = {k: v for k, v in content["teacher"].items() if k.startswith("backbone.")}
    save_checkpoint(tmp_path / "bare.pt", {"teacher": backbone, "config": content["config"]})
    bare = ("--checkpoint", tmp_path / "bare.pt")
    assert "no projection head" in refused(given(run, *bare, "--projection"), run)
    assert "--network student" in refused(given(run, *bare, "--network", "student"), run)
    (tmp_path / "text.pt").write_text("hello")
    assert "text.pt" in refused(given(run, "--checkpoint", tmp_path / "text.pt"), run)
    more = write_photos(tmp_path / "more", {**COLORS, "white": (200, 200, 200)}, 1)
    assert "white" in refused(given(run, "--val", more), run)


def test_two_runs_never_share_a_folder(given, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(given(folder, "--epochs", "1")) == 0
    for also, says in (
        ((), "already holds a run"),
        (("--resume", "auto", "--epochs", "2"), "--epochs 1 is now 2"),
        (("--resume", "auto", "--epochs", "1", "--labels", "0.5"), "--labels"),
    ):
        capsys.readouterr()
        options = ("--epochs", "1", *also)
        assert main(given(folder, *options)) == 2
        assert says in capsys.readouterr().err


def damaged(folder: Path, names: list[Path]) -> Path:
    """The photos of `folder` anew, with `names` cut to a few bytes."""
    for path in names:
        path.write_bytes(path.read_bytes()[:20])
    return folder


def test_photos_that_cannot_be_read_are_named_or_refused_before_the_first_step(
    given, refused, folders, tmp_path, caplog, capsys
):
    val = tmp_path / "val"
    shutil.copytree(folders[1], val)
    photos = sorted(val.rglob("*.jpg"))
    damaged(val, photos[:1])
    assert main(given(tmp_path / "run", "--val", val, "--stop-after", "3")) == 0
    assert f"left out of the evaluation: {photos[0].relative_to(val)}" in caplog.text
    damaged(val, photos[1:])
    capsys.readouterr()
    run = tmp_path / "none"
    assert "no photo in it can be read" in refused(given(run, "--val", val), run)


def test_one_class_is_refused_and_one_set_for_both_is_noted(
    given, refused, folders, tmp_path, capsys
):
    one, run = tmp_path / "one", tmp_path / "none"
    shutil.copytree(sorted(folders[1].iterdir())[0], one / "red")
    assert "a single class" in refused(given(run, "--train", one, "--val", one), run)
    same = ("--val", folders[0], "--stop-after", "1")
    assert main(given(tmp_path / "run", *same)) == 0
    assert "do not measure generalization" in capsys.readouterr().out
