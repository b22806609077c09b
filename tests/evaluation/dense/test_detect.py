import json
import shutil

import pytest
import torch

from ibeton.evaluation.detect import DetectConfig, Detection, main
from ibeton.model.checkpoint import load_checkpoint

SMALL = (
    "--batch-size 2 --short-sides 48 64 --long-side 96 --fpn-width 16 --warmup-steps 2 --workers 0"
    " --device cpu --lr 2e-3 --log-steps 1 --epochs 2 --drops 1 --pictures 2"
)


def detect(checkpoint, coco, folder, *options):
    arguments = ["--checkpoint", str(checkpoint), "--data", str(coco), "--output-dir", str(folder)]
    return main([*arguments, *SMALL.split(), *options])


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(checkpoint, coco, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    assert detect(checkpoint, coco, folder) == 0
    return folder


def test_a_run_leaves_losses_of_all_stages_scores_and_pictures(unbroken):
    steps = [r for r in records(unbroken) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(6))
    assert all(
        r[f"{part}{i}"] >= 0 for r in steps for part in ("class", "box", "mask") for i in range(3)
    )
    assert [round(r["lr"] / 2e-3, 3) for r in steps] == [0.5, 1, 1, 0.1, 0.1, 0.1]
    scores = json.loads((unbroken / "scores.json").read_text())["scores"]
    assert {"box_ap", "box_ap50", "mask_ap", "mask_ap75"} <= set(scores)
    assert len(list((unbroken / "pictures").glob("*.png"))) == 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_few_photos_are_learned_by_heart(checkpoint, coco, tmp_path):
    options = ("--epochs", "40", "--drops", "36", "--eval-every", "12", "--drop-path", "0")
    assert detect(checkpoint, coco, tmp_path / "run", *options, "--pictures", "0") == 0
    steps = [r["loss"] for r in records(tmp_path / "run") if "loss" in r]
    assert sum(steps[-10:]) < 0.5 * sum(steps[:10])
    scores = [r for r in records(tmp_path / "run") if "box_ap50" in r]
    assert scores[0]["box_ap50"] < 5
    assert scores[-1]["box_ap50"] > 50
    assert scores[-1]["mask_ap50"] > 50


def test_a_stopped_run_resumes_to_the_same_weights(unbroken, checkpoint, coco, tmp_path):
    folder = tmp_path / "run"
    assert detect(checkpoint, coco, folder, "--max-hours", "1e-9") == 85
    assert detect(checkpoint, coco, folder, "--resume", "auto") == 0
    ended, expected = (load_checkpoint(f / "checkpoint.pt")["model"] for f in (folder, unbroken))
    assert all(torch.equal(ended[name], tensor) for name, tensor in expected.items())


def test_layer_decay_gives_earlier_blocks_lower_rates(checkpoint, coco, tmp_path):
    from ibeton.evaluation.dense.task import parameter_groups

    config = DetectConfig(
        checkpoint=str(checkpoint), data=str(coco), output_dir=str(tmp_path), fpn_width=16
    )
    model = Detection(config).model
    rates = {}
    for group in parameter_groups(model, 0.05, 0.5):
        for parameter in group["params"]:
            rates[parameter] = (group["lr_scale"], group["weight_decay"])
    backbone = model.pyramid.backbone
    assert rates[backbone.pos_embed] == (0.125, 0.05)
    assert rates[backbone.blocks[0].attn.qkv.weight] == (0.25, 0.05)
    assert rates[backbone.blocks[1].attn.qkv.weight] == (0.5, 0.05)
    assert rates[backbone.blocks[1].attn.qkv.bias] == (0.5, 0.0)
    assert rates[model.cascade.stages[0].box_predictor.cls_score.weight] == (1.0, 0.05)
    assert {p for p in model.parameters() if p.requires_grad} == set(rates)


def test_bad_settings_are_one_sentence(checkpoint, coco, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        detect(checkpoint, coco, tmp_path / "run", "--long-side", "32")
    assert ended.value.code == 2
    assert "--long-side" in capsys.readouterr().err
    assert detect(checkpoint, tmp_path, tmp_path / "run") == 2
    assert "train2017.json: No such file" in capsys.readouterr().err
    broken = shutil.copytree(coco, tmp_path / "coco")
    (broken / "annotations/instances_val2017.json").write_text('{"images": []}')
    assert detect(checkpoint, broken, tmp_path / "run") == 2
    assert "instances_val2017.json is not in COCO's format" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
