"""What a run leaves for others: a configuration to start from, a backbone with its card, records in
trackers; and two runs compared."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_runs import Start, losses, records

import ibeton
from ibeton.model.checkpoint import load_checkpoint
from ibeton.training import runs
from ibeton.training.log.trackers import Trackers

STEPS = "9"  # one more than an epoch


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's and W&B's, offline."""
    return tmp_path_factory.mktemp("trackers")


def test_a_run_from_the_configuration_of_another_is_identical(start: Start, tmp_path: Path) -> None:
    one, two, third = (tmp_path / name for name in ("one", "two", "third"))
    first = start(one, "--stop-after", "3", "--seed", "5", "--lr", "3e-3")
    assert first.wait() == 0, first.said()[-2000:]
    second = start(two, "--config", str(one / "config.json"), small=[])
    assert second.wait() == 0, second.said()[-2000:]
    assert losses(two) == losses(one)
    assert len(losses(two)) == 3
    weights = [load_checkpoint(folder / "checkpoint.pt")["teacher"] for folder in (one, two)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    other = start(third, "--config", str(one), "--seed", "6", small=[])
    assert other.wait() == 0, other.said()[-2000:]
    assert losses(third) != losses(one)
    assert "recipe vit_t with" in first.said()
    assert "--lr 0.003" in first.said()


COUNTING = """
from torch.utils._python_dispatch import _get_current_dispatch_mode
from ibeton import train
spread = train.spread
def look(*arguments):
    if _get_current_dispatch_mode() is not None:
        print("counted")
    return spread(*arguments)
train.spread = look
"""


def test_the_teachers_backbone_is_written_with_its_card(
    start: Start, tmp_path: Path, tiny: Path
) -> None:
    folder = tmp_path / "run"
    evaluation = ["--eval-train", str(tiny), "--eval-val", str(tiny), "--eval-every", "2"]
    process = start(folder, "--epochs", "2", "--keep-every", "1", *evaluation, fault=COUNTING)
    assert process.wait() == 0, process.said()[-2000:]
    assert "counted" not in process.said(), "the spread is no part of the step"
    names = sorted(path.name for path in folder.glob("backbone*"))
    kinds = [f"{name}{kind}" for name in ("backbone", "backbone0001", "backbone0002")
             for kind in (".md", ".safetensors")]  # fmt: skip
    assert names == kinds
    alone, config = ibeton.load_backbone(folder / "backbone0001.safetensors")
    whole, _ = ibeton.load_backbone(folder / "checkpoint0001.pt")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(alone(images), whole(images))
    assert config == load_checkpoint(folder / "checkpoint0001.pt")["config"]
    card = (folder / "backbone0002.md").read_text()
    assert "| trained for | 16 steps, 2 epochs |" in card
    assert "| photos | 64 of tiny" in card
    assert "| `embed_dim` | 32 |" in card
    assert "last loss" in card
    assert "| images per step | 8 |" in card
    for unlisted in ("output_dir", "lost_after", "patch_out_dim"):  # they shape no weights
        assert f"`{unlisted}`" not in card
    scores = {r["step"]: r["knn_top1"] for r in records(folder) if "knn_top1" in r}
    assert f"| k-NN top-1 | {scores[16]:.2f} % (k 20) |" in card
    assert "k-NN" not in (folder / "backbone0001.md").read_text(), "it was not evaluated"
    again = start(tmp_path / "next", "--stop-after", "1", "--init-from",
                  str(folder / "backbone.safetensors"))  # fmt: skip
    assert again.wait() == 0, again.said()[-2000:]


def test_two_runs_are_compared(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, lr in ((one, "1e-3"), (two, "2e-3")):
        assert start(folder, "--stop-after", "2", "--lr", lr).wait() == 0
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    (tmp_path / "broken" / "run.json").write_text("{")
    png = tmp_path / "both.png"
    assert runs.main(["compare", str(one), str(two), "--png", str(png)]) == 0
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert said[0] == ["one", "two"]
    assert [line for line in said if line[0].startswith("--")] == [["--lr", "0.001", "0.002"]]
    assert Image.open(png).size[0] > 500
    assert runs.main([str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "unreadable" in listed, "a damaged run does not hide the others"
    assert listed.count("finished") == 2
    assert runs.main(["compare", str(one), str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no run folder" in capsys.readouterr().err


@pytest.mark.slow
def test_records_go_to_mlflow_and_a_resumed_run_continues_there(
    start: Start, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    folder, uri = tmp_path / "run", f"file:{store}/mlruns"
    fault = f"import os\nos.environ['MLFLOW_TRACKING_URI'] = {uri!r}\n"
    fault += "os.environ['MLFLOW_ALLOW_FILE_STORE'] = 'true'\n"
    for steps in ("2", "3"):
        options = ("--log-to", "mlflow", "--resume", "auto", "--stop-after", steps)
        process = start(folder, *options, fault=fault)
        assert process.wait() == 0, process.said()[-3000:]
        assert "--log-to mlflow: no further" not in process.said()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = tracking.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("ibeton").experiment_id])
    found = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
    assert found == [(step, loss) for step, loss, *_ in losses(folder)]
    assert run.data.params["embed_dim"] == "32"
    assert "stage_ms/backward" in run.data.metrics
    assert run.info.status == "FINISHED"


RECORDS = [
    {"step": 0, "loss": 1.5, "stage_ms": {"backward": 2.0}, "indices": [3, 4], "head": None},
    {"step": 1, "loss": 1.25},
    {"step": 0, "loss": 1.0},  # after a rollback
]


def test_records_go_to_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for patience in ("WANDB__SERVICE_WAIT", "WANDB_INIT_TIMEOUT"):  # its service may start slowly
        monkeypatch.setenv(patience, "3000")
    trackers = Trackers(["wandb"], "abc123", tmp_path, {"lr": 1e-3, "log_to": ("wandb",)})
    for record in RECORDS:
        trackers.record(record)
    trackers.close()
    (path,) = tmp_path.glob("wandb/offline-run-*-abc123/*.wandb")
    while not any(r.HasField("exit") for r in wandb_records(path)):  # its service writes later
        time.sleep(0.1)
    found = [
        {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(path)
        if record.history.item
    ]
    assert [(items["step"], items["loss"]) for items in found] == [(0, 1.5), (1, 1.25), (0, 1.0)]
    assert found[0]["stage_ms/backward"] == 2.0
    assert not {"indices", "head"} & set(found[0])


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: LevelDB's log format, in blocks of 32 KiB, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if left < 7 or kind == 0:  # the rest of a block is empty
            place += left
            continue
        if place + 7 + length > len(data):  # it is still being written
            return
        part = data[place + 7 : place + 7 + length]
        place += 7 + length
        whole = part if kind in (1, 2) else whole + part
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            yield record


def test_a_tracker_that_fails_costs_a_line_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow.tracking")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/file/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    trackers = Trackers(["mlflow"], "abc123", tmp_path, {})
    for record in RECORDS:
        trackers.record(record)
    trackers.close()
    assert capsys.readouterr().err.count("--log-to mlflow: no further records are sent") == 1
