"""The page of figures: what was measured, what was published, and pictures."""

import base64
import json
import re

import pytest
from PIL import Image

from ibeton.evaluation.published import published
from ibeton.evaluation.report import main


def write_report(path, scores, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"checkpoint": "runs/a/checkpoint.pt", "arch": "vit_b", "left_out": {}, **more}
    path.write_text(json.dumps({**content, "scores": scores}))


@pytest.fixture
def runs(tmp_path):
    """A pre-training folder with frozen scores and a picture, and a fine-tuning folder."""
    frozen = {
        "teacher": {"knn": {"best_top1": 41.25, "k20_top1": 41.0}, "parts": {"k1_top1": 30.0}},
        "untrained": {"knn": {"best_top1": 25.0, "k20_top1": 24.0}, "parts": {"k1_top1": 20.0}},
    }
    write_report(tmp_path / "a" / "checkpoint.all.json", frozen, left_out={"semi": "no | labels"})
    (tmp_path / "a" / "config.json").write_text('{"arch": "vit_b"}')
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "a" / "a curve.png")
    tuned = {"teacher": {"semi_0.1": {"top1": 55.5}, "transfer_cars": {"top1": 60.0}}}
    write_report(tmp_path / "b" / "finetune.json", tuned)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_measured_figures_stand_beside_published_ones_of_the_architecture(runs, tmp_path, capsys):
    output = tmp_path / "out" / "report.md"
    assert main([*runs, "--output", str(output)]) == 0
    rows = [line.split(" | ")[:4] for line in output.read_text().splitlines()]
    assert ["| k-NN, top-1", "teacher", "41.25", "77.1"] in rows
    assert ["| k-NN, top-1", "untrained", "25.00", "77.1"] in rows
    few = "| fine-tuning on 10 % of the labels, top-1"
    assert [few, "teacher", "55.50", "not published"] in rows
    assert ["| transfer to Cars, top-1", "teacher", "60.00", "94.3"] in rows
    assert "| parts | k1_top1 | teacher | 30 |  |" in output.read_text()
    assert "left out: semi: no | labels" in output.read_text()
    assert output.read_text().count("## vit_b: runs/a/checkpoint.pt") == 1
    assert "41.25" in capsys.readouterr().out


def test_the_page_holds_its_pictures(runs, tmp_path):
    output = tmp_path / "report.md"
    assert main([*runs, "--output", str(output)]) == 0
    assert "](a/a%20curve.png)" in output.read_text()
    text = output.with_suffix(".html").read_text()
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert base64.b64decode(data) == (tmp_path / "a" / "a curve.png").read_bytes()
    assert "<td>41.25</td><td>77.1</td>" in text


def test_backbones_of_two_checkpoints_have_a_section_each(runs, tmp_path):
    scores = {"teacher": {"knn": {"best_top1": 1.0}}}
    write_report(tmp_path / "c" / "x.json", scores, checkpoint="other.pt", arch="vit_t")
    output = tmp_path / "report.md"
    assert main([*runs, str(tmp_path / "c"), "--output", str(output)]) == 0
    assert "## vit_t: other.pt" in output.read_text()
    assert "| k-NN, top-1 | teacher | 1.00 | not published |" in output.read_text()


def test_scores_of_segmentation_and_detection_are_read_too(runs, tmp_path):
    settings = {"checkpoint": "runs/a/checkpoint.pt", "network": "teacher", "epochs": 1}
    for folder, scores in (("s", {"miou": 44.0}), ("d", {"box_ap": 40.5, "mask_ap": 35.0})):
        (tmp_path / folder).mkdir()
        content = {"settings": settings, "scores": scores}
        (tmp_path / folder / "scores.json").write_text(json.dumps(content))
    output = tmp_path / "report.md"
    folders = [str(tmp_path / folder) for folder in ("s", "d")]
    assert main([*folders, *runs, "--output", str(output)]) == 0  # an old one names no arch
    assert "unknown" not in output.read_text()
    segmented = "segmentation with UperNet, mIoU (published: ADE20K)"  # which these need not be
    assert f"| {segmented} | teacher | 44.00 | 50.0 |" in output.read_text()
    assert "| detection, box AP (published: COCO) | teacher | 40.50 | 51.2 |" in output.read_text()
    settings["untrained"] = True
    untrained = {"settings": settings, "scores": {"miou": 9.0}}
    (tmp_path / "s" / "scores.json").write_text(json.dumps(untrained))
    assert main([*folders, "--output", str(output)]) == 0
    assert f"| {segmented} | untrained | 9.00 | not published |" in output.read_text()


def test_one_checkpoint_has_one_section_however_its_path_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    absolute = str(tmp_path / "runs" / "a" / "checkpoint.pt")
    for name, path in (
        ("x", absolute),
        ("y", "runs/a/checkpoint.pt"),
        ("z", "./runs/b/../a/checkpoint.pt"),
    ):
        write_report(tmp_path / f"{name}.json", {"teacher": {name: {"top1": 1.5}}}, checkpoint=path)
    assert main(["x.json", "y.json", "z.json"]) == 0
    text = (tmp_path / "report.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## vit_b: runs/a/checkpoint.pt"
    ]
    assert all(f"| {name} | top1 | teacher | 1.5 |" in text for name in "xyz")


def test_the_terminal_shows_the_known_figures_of_every_backbone(runs, tmp_path, capsys):
    scores = {"teacher": {"knn": {"best_top1": 12.5, "k10_top1": 11.25}}}
    write_report(tmp_path / "c" / "x.json", scores, checkpoint="other.pt", arch="vit_t")
    assert main([*runs, str(tmp_path / "c"), "--output", str(tmp_path / "report.md")]) == 0
    said = capsys.readouterr().out
    assert "| k-NN, top-1 | teacher | 41.25 |" in said
    assert "| k-NN, top-1 | teacher | 12.50 |" in said
    assert "11.25" not in said


def test_counts_are_not_rounded(tmp_path):
    scores = {"teacher": {"finetune": {"photos": 1_281_167, "top1": 55.25}}}
    write_report(tmp_path / "a.json", scores)
    assert main([str(tmp_path / "a.json"), "--output", str(tmp_path / "report.md")]) == 0
    assert "| finetune | photos | teacher | 1,281,167 |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "holds no scores yet"),
        (lambda path: path.write_text("{"), "not a valid JSON file"),
        (lambda path: path.write_text('{"arch": 1}'), "it lacks checkpoint or scores"),
    ],
)
def test_nothing_to_report_is_one_sentence_and_status_2(write, says, tmp_path, capsys):
    write(tmp_path / "run")
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "report.md")]) == 2
    said = capsys.readouterr().err.strip()
    assert says in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "report.md").exists()


def test_published_figures_are_those_of_the_paper():
    assert published("finetune", "top1", "vit_s") == "82.3"
    assert published("finetune", "top1", "vit_l") == "84.8"
    assert published("semi_0.01", "top1", "vit_b") == "not published"
    assert published("knn", "k20_top1", "vit_s") == ""
