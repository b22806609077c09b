"""Both dense tasks as processes: killed and resumed, and shared by two ranks."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from run_processes import Forker, two_ranks
from small_runs import HOLD

from ibeton.model.checkpoint import load_checkpoint
from ibeton.training.health.stop_signals import STOPPED

COMMON = (
    "--warmup-steps 2 --workers 0 --device cpu --log-steps 1 --pictures 0 --drop-path 0 --lr 1e-3"
)
SEGMENT = "--crop-size 64 --short-side 48 --batch-size 4 --steps 8 --head-width 16 --head"
TASKS = {
    "segment upernet": f"{SEGMENT} upernet",
    "segment linear": f"{SEGMENT} linear",
    # Every batch is filled up to 64 x 64 pixels, however it is shared.
    "detect": "--short-sides 64 --long-side 64 --fpn-width 16 --batch-size 2 --epochs 3 --drops 2",
}
pytestmark = pytest.mark.timeout(3600)  # on a busy machine imports alone take minutes


@pytest.fixture(scope="module")
def forkers(tmp_path_factory):
    """What has imported a command, by its name."""
    made = {}

    def forker(name):
        if name not in made:
            made[name] = Forker(f"ibeton.evaluation.{name}", tmp_path_factory.mktemp("said"))
        return made[name]

    yield forker
    for one in made.values():
        one.close()


@pytest.fixture(scope="module")
def start(request, forkers, checkpoint, scenes, coco):
    """Begins a run of a task as a process: `start(folder, *options, environment={}, fault="")`."""
    name = request.param.split()[0]
    data = {"segment": scenes, "detect": coco}[name]

    def begin(folder, *options, environment=None, fault=""):
        paths = ("--checkpoint", checkpoint, "--data", data, "--output-dir", folder)
        arguments = (*paths, *COMMON.split(), *TASKS[request.param].split(), *options)
        return forkers(name).start(folder, [str(one) for one in arguments], environment, fault)

    return begin


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run = start(folder)
    assert run.wait() == 0, run.said()[-3000:]
    return folder


def losses(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def scores(folder):
    content = json.loads((folder / "scores.json").read_text())
    return {k: v for k, v in content["scores"].items() if v == v}  # not those that are NaN


def model(folder):
    return load_checkpoint(folder / "checkpoint.pt")["model"]


def trained(folder):
    """Names of the norms' weights that are not 1 any more, as they were."""
    vectors = {k: v for k, v in model(folder).items() if v.dim() == 1 and k.endswith("weight")}
    return {name for name, vector in vectors.items() if not torch.equal(vector, vector**0)}


@pytest.mark.parametrize(
    "start", ["detect", pytest.param("segment upernet", marks=pytest.mark.slow)], indirect=True
)
def test_killed_at_random_steps_and_resumed_it_ends_bit_equal(start, whole, tmp_path):
    folder, draws = tmp_path / "broken", random.Random(0)
    again = ("--save-steps", "1", "--resume", "auto")
    for first, last in ((0, 2), (3, 6)):
        run = start(folder, *again, fault=HOLD.format(step=7))
        run.until_step(draws.randint(first, last))
        run.kill()
        assert run.wait() == -1
    run = start(folder, *again)
    assert run.wait() == 0, run.said()[-3000:]
    assert "resumed at step" in run.said()
    assert losses(folder) == losses(whole)
    ended = model(folder)
    assert all(torch.equal(ended[name], tensor) for name, tensor in model(whole).items())
    assert scores(folder) == scores(whole)


@pytest.mark.parametrize(
    "start",
    [
        "segment linear",
        *(pytest.param(task, marks=pytest.mark.slow) for task in ("detect", "segment upernet")),
    ],
    indirect=True,
)
def test_two_processes_that_are_stopped_and_resumed_do_what_one_does(start, whole, tmp_path):
    folder = tmp_path / "two"
    for options, status in ((("--max-hours", "1e-9"), STOPPED), (("--resume", "auto"), 0)):
        for run in [start(folder, *options, environment=rank) for rank in two_ranks()]:
            assert run.wait() == status, run.said()[-3000:]
    expected, found = losses(whole), losses(folder)
    assert found.keys() == expected.keys()
    # Rounding grows from step to step under AdamW. Without the mean of gradients over processes,
    # losses part by more than this at the second step.
    for step in range(4):
        assert found[step] == pytest.approx(expected[step], rel=2e-3), (step, found, expected)
    assert scores(folder).keys() == scores(whole).keys()
    assert trained(folder) == trained(whole)


@pytest.mark.parametrize("start", ["segment linear"], indirect=True)
def test_a_rank_that_fails_ends_the_other_with_its_reason(start, scenes, tmp_path):
    broken = shutil.copytree(scenes, tmp_path / "scenes")
    Image.fromarray(np.full((48, 64), 99, np.uint8)).save(broken / "annotations/train/0.png")
    options = ("--data", broken)
    runs = [start(tmp_path / "run", *options, environment=rank) for rank in two_ranks()]
    assert sorted(run.wait() for run in runs) == [-1, 1]  # the watchdog ends the other at once
    for run in runs:
        assert "train/0.png holds label 99" in run.said()
