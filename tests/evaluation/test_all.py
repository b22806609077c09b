"""All protocols as people run them, on one process and on two, and in training."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from paths import ROOT
from slurm import end, free_job, srun_words, start

from ibeton.evaluation import all as every
from ibeton.evaluation.frozen import cluster, knn, linear, logistic, parts, retrieval, semi
from ibeton.evaluation.frozen.quick import quick_scores
from ibeton.model.checkpoint import load_checkpoint, model_state, save_checkpoint
from ibeton.model.config import ModelConfig
from ibeton.model.ibot import build, build_network
from ibeton.options import fill

FAST = ["--epochs", "3", "--k", "5", "--device", "cpu"]


def arguments(checkpoint, folders, *also):
    sets = ("--checkpoint", checkpoint, "--train", folders[0], "--val", folders[1])
    return [str(part) for part in (*sets, *also)]


def two_processes(*given) -> str:
    """What evaluation.all says under torchrun."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "ibeton.evaluation.all", *given],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_one_command_runs_all_protocols_and_two_processes_score_the_same(
    checkpoint, folders, tmp_path, capsys
):
    def given(name):
        folder = ("--cache", tmp_path / name, "--json", tmp_path / f"{name}.json")
        return [*arguments(checkpoint, folders, *folder, "--untrained"), *FAST]

    assert every.main(given("one")) == 0
    said = capsys.readouterr().out
    scores = json.loads((tmp_path / "one.json").read_text())["scores"]
    assert list(scores) == ["teacher", "untrained"]
    for protocols in scores.values():
        assert list(protocols) == [protocol.name for protocol in every.PROTOCOLS]
        for protocol in every.PROTOCOLS:
            found = protocols[protocol.name]
            assert set(protocol.headlines) <= set(found)
            for score, value in found.items():
                assert 0 <= value <= 100 or score.endswith("ari")
    assert "| network" not in said, "a line of Markdown for all protocols would fit no terminal"
    assert two_processes(*given("two")).count("retrieval") == said.count("retrieval") == 1
    again = json.loads((tmp_path / "two.json").read_text())["scores"]
    for network, protocols in scores.items():
        for name, values in protocols.items():
            assert again[network][name] == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize("module", [linear, logistic, semi, cluster, parts, retrieval])
def test_each_protocol_is_a_command_of_its_own(module, checkpoint, folders, tmp_path, capsys):
    own = ("--cache", tmp_path, "--json", tmp_path / "scores.json", "--device", "cpu")
    fast = ("--epochs", "2") if module in (linear, semi, parts) else ()
    assert module.main(arguments(checkpoint, folders, *own, *fast)) == 0
    report = json.loads((tmp_path / "scores.json").read_text())
    (scores,) = report["scores"]["teacher"].values()
    assert all(f"{score} " in capsys.readouterr().out for score in list(scores)[:1])


def test_scores_stand_beside_the_checkpoint_unless_told_otherwise(checkpoint, folders):
    retrieval.main(arguments(checkpoint, folders, "--device", "cpu"))
    path = checkpoint.with_name("checkpoint.retrieval.json")
    assert json.loads(path.read_text())["checkpoint"] == str(checkpoint)
    assert list((checkpoint.parent / "features").iterdir())


def test_a_file_of_scores_says_how_they_were_measured(checkpoint, folders, tmp_path):
    own = ("--cache", tmp_path, "--json", tmp_path / "s.json", "--sgd-batch", "7", "--lr", "0.5")
    assert semi.main(arguments(checkpoint, folders, *own, *FAST)) == 0
    report = json.loads((tmp_path / "s.json").read_text())
    sets = {"train": str(folders[0]), "val": str(folders[1]), "image_size": 32}
    how = {"epochs": 3, "sgd_batch": 7, "lr": [0.5], "k": [5], "temperature": 0.07}
    seeds = {"subset_seed": 0, "pixels": False}
    network = {"checkpoint": str(checkpoint), "network": "teacher", "arch": "vit_s"}
    resolved = {"precision": "fp32", "left_out": {}}  # auto, on a CPU
    del report["scores"]
    assert report == {**sets, **how, **seeds, **network, **resolved}


def test_scores_of_other_settings_or_data_are_not_replaced(checkpoint, folders, tmp_path, capsys):
    copy = tmp_path / "copy.pt"
    shutil.copy(checkpoint, copy)
    scores = tmp_path / "copy.knn.json"
    given = [*arguments(copy, folders, "--device", "cpu"), "--k"]
    assert knn.main([*given, "5"]) == 0
    scores.write_text(scores.read_text().replace('"best_top1"', '"older"'))
    assert knn.main([*given, "5"]) == 0
    kept = scores.read_text()
    assert '"best_top1"' in kept, "those of the same settings are replaced"
    swapped = [*arguments(copy, folders[::-1], "--device", "cpu"), "--k", "5"]
    for other, says in (([*given, "3"], "(--k)"), (swapped, "(--train, --val)")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            knn.main(other)
        assert stopped.value.code == 2
        said = capsys.readouterr().err.strip()
        assert says in said
        assert "give --json FILE" in said
        assert len(said.splitlines()) == 1
    assert scores.read_text() == kept
    older = {"checkpoint": str(copy), "precision": "auto"}  # as earlier versions wrote it
    older |= {name: json.loads(kept)[name] for name in ("train", "val", "scores")}
    scores.write_text(json.dumps(older, indent=1))
    assert knn.main([*given, "3"]) == 0
    assert knn.main([*given, "5", "--json", str(tmp_path / "three.json")]) == 0


@pytest.fixture(scope="module")
def swin_checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    sizes = {"arch": "swin_t7", "embed_dim": 192, "patch_size": 32, "image_size": 32}
    head = {"out_dim": 16, "patch_out_dim": 16, "hidden_dim": 16, "bottleneck_dim": 8}
    config = ModelConfig(**sizes, **head)
    path = tmp_path_factory.mktemp("swin") / "checkpoint.pt"
    save_checkpoint(path, model_state(build(config)) | {"config": asdict(config)})
    return path


def test_all_of_a_swin_leaves_out_parts_and_says_so(swin_checkpoint, folders, capsys):
    assert every.main(arguments(swin_checkpoint, folders, *FAST, "--network", "student")) == 0
    report = json.loads(swin_checkpoint.with_name("checkpoint.all.json").read_text())
    assert "parts" not in report["scores"]["student"]
    assert "linear" in report["scores"]["student"]
    assert "left out: parts: part-wise probing of swin_t7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "also", "says"),
    [
        (logistic, ["--precision", "fp16", "--device", "cpu"], "--precision fp16"),
        (logistic, ["--batch-size", "0"], "--batch-size"),
        (logistic, ["--image-size", "33"], "33"),
        (linear, ["--epochs", "0"], "--epochs"),
        (linear, ["--lr", "-1"], "--lr"),
        (parts, ["--sgd-batch", "0"], "--sgd-batch"),
        (semi, ["--k", "0"], "--k"),
        (semi, ["--augmented"], "--augmented"),  # of linear alone
        (parts, ["--augmented"], "--augmented"),
        (semi, ["--temperature", "0"], "--temperature"),
        (cluster, ["--network", "both"], "--network"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    module, also, says, checkpoint, folders, tmp_path, capsys
):
    with pytest.raises(SystemExit) as stopped:
        module.main(arguments(checkpoint, folders, *also, "--cache", tmp_path))
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip()
    assert says in said
    assert len(said.splitlines()) == 1
    computed = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not computed, "features were computed before the options were checked"


def test_parts_of_a_swin_alone_are_refused(swin_checkpoint, folders, capsys):
    with pytest.raises(SystemExit) as stopped:
        parts.main(arguments(swin_checkpoint, folders, "--device", "cpu"))
    assert stopped.value.code == 2
    assert "give a ViT" in capsys.readouterr().err


def test_quick_scores_are_those_of_the_commands(checkpoint, folders, tmp_path):
    content = load_checkpoint(checkpoint)
    network = build_network(fill(ModelConfig, content["config"]), is_student=False).train()
    network.load_state_dict(content["teacher"])
    quick = quick_scores(network, *folders, image_size=32, k=5)
    assert network.training
    assert all(type(value) in (float, int) for value in quick.values())
    every.main(
        arguments(checkpoint, folders, *FAST, "--cache", tmp_path, "--json", tmp_path / "s.json")
    )
    scores = json.loads((tmp_path / "s.json").read_text())["scores"]["teacher"]
    assert quick["knn_top1"] == scores["knn"]["k5_top1"]
    assert quick["knn_top5"] == scores["knn"]["k5_top5"]
    for name in ("acc", "ari", "nmi", "fmi", "fmi_chance", "clusters"):
        assert quick[f"head_{name}"] == pytest.approx(scores["cluster"][f"head_{name}"])


@pytest.mark.slow
def test_tasks_of_srun_score_as_one_process(checkpoint, folders, tmp_path):
    def given(name):
        folder = ("--cache", tmp_path / name, "--json", tmp_path / f"{name}.json")
        return [*arguments(checkpoint, folders, *folder), "--k", "5", "--device", "cpu"]

    assert knn.main(given("one")) == 0
    command = [sys.executable, "-m", "ibeton.evaluation.frozen.knn", *given("two")]
    job = free_job()
    tasks = [start(command, tmp_path, f"rank{i}", srun_words(i, 2, job)) for i in range(2)]
    try:
        assert [task.wait() for task in tasks] == [0, 0], (tmp_path / "rank0.log").read_text()
    finally:
        end(tasks)
    one, two = (
        json.loads((tmp_path / f"{name}.json").read_text())["scores"] for name in ("one", "two")
    )
    assert one == two
    assert "| teacher |" in (tmp_path / "rank0.log").read_text()
    assert "| teacher |" not in (tmp_path / "rank1.log").read_text(), "rank 0 alone speaks"
