"""`ibeton robustness` as people run it: a layer of linear probing, all sets, curves, bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from photo_folders import new_classifier
from PIL import Image

from ibeton.__main__ import main as ibeton
from ibeton.evaluation.finetune.classifier import classifier_state
from ibeton.evaluation.frozen.features import Extraction, normalized
from ibeton.evaluation.photos import PhotoSet, bilinear_view
from ibeton.evaluation.robustness.classifier import load_classifier
from ibeton.evaluation.robustness.curves import Saliency, curve_scores, measure
from ibeton.model.checkpoint import load_checkpoint, save_checkpoint

FAST = ("--epochs", "30", "--lr", "0.1", "0.5", "--device", "cpu")


@pytest.fixture(scope="module")
def head(checkpoint, folders, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    sets = ("--checkpoint", checkpoint, "--train", folders[0], "--val", folders[1])
    kept = ("--save-head", folder / "head.pt", "--cache", folder, "--json", folder / "linear.json")
    assert ibeton([str(part) for part in ("linear", *sets, *kept, *FAST)]) == 0
    return folder / "head.pt"


@pytest.fixture
def sets(folders, tmp_path) -> list[str]:
    """All sets, made of the validation photos: names of classes are blue, green, red."""
    val = Path(folders[1])
    for severity in "12345":
        for corruption in ("fog", "snow"):
            target = tmp_path / "c" / corruption / severity
            for path in val.rglob("*.jpg"):
                (target / path.parent.name).mkdir(parents=True, exist_ok=True)
                image = Image.open(path).resize((32, 32))
                image.save(target / path.parent.name / path.name)
    names = ("dog", "bird", "vehicle", "reptile", "carnivore", "insect", "music", "primate", "fish")
    colors = {0: "blue", 1: "green", 2: "red"}
    for variant in ("mixed_same", "mixed_rand"):
        for number, name in enumerate(names):
            target = tmp_path / "in9" / variant / "val" / f"{number:02d}_{name}"
            target.mkdir(parents=True)
            photo = next((val / colors[number % 3]).glob("*.jpg"))
            Image.open(photo).resize((32, 32)).save(target / "photo.png")
    given = {"--imagenet-a": val, "--imagenet-r": val, "--imagenet-c": tmp_path / "c", "--val": val}
    return [str(part) for pair in given.items() for part in pair]


def call(checkpoint: Path, *also: object) -> list[str]:
    return [str(p) for p in ("robustness", "--checkpoint", checkpoint, "--device", "cpu", *also)]


def test_one_command_measures_all_sets_and_draws_curves(
    checkpoint, head, sets, folders, tmp_path, capsys
):
    path = tmp_path / "scores.json"
    assert ibeton(call(checkpoint, "--head", head, "--json", path, *sets)) == 0
    report = json.loads(path.read_text())
    assert (report["arch"], report["image_size"], report["classes"]) == ("vit_s", 32, 3)
    assert report["left_out"] == {
        "mce": f"{tmp_path / 'c'} lacks some of the 15 standard corruptions"
    }
    scores = report["scores"]["teacher"]
    assert list(scores) == ["imagenet_a", "imagenet_r", "imagenet_c", "occlusion", "shuffle"]
    clean = torch.load(head)["top1"]
    assert scores["imagenet_a"]["top1"] == pytest.approx(clean)
    assert scores["occlusion"]["clean"] == scores["shuffle"]["clean"] == pytest.approx(clean)
    assert clean > 60
    assert set(scores["imagenet_c"]) == {"fog_error", "snow_error", "mean_error"}
    assert list(scores["shuffle"]) == ["clean", "2x2", "2x4", "4x4", "4x8", "8x8", "16x16"]
    for ratio in (0.1, 0.5, 0.9):
        assert scores["occlusion"][f"random_{ratio}_dropped"] == 100 * int(ratio * 16) / 16
    assert np.asarray(Image.open(tmp_path / "scores.png")).shape[1] > 600
    assert "curves" not in capsys.readouterr().err


def test_backgrounds_by_a_users_map(checkpoint, head, sets, tmp_path):
    """IN-9 has nine classes and this classifier three: a map of three alone is refused."""
    (tmp_path / "map.json").write_text(json.dumps({"0": 0, "1": 1, "2": 2}))
    given = ("--head", head, "--in9", tmp_path / "in9", "--in9-map", tmp_path / "map.json")
    with pytest.raises(SystemExit) as stopped:
        ibeton(call(checkpoint, *given))
    assert stopped.value.code == 2


def test_logits_are_those_of_the_layer_on_the_features(checkpoint, head, folders):
    judged = load_classifier(checkpoint, head, "teacher")
    content = torch.load(head)
    photos = PhotoSet(folders[1], 32)
    images = normalized(torch.stack([photos[i][0] for i in range(4)]), "cpu")
    with torch.no_grad():
        blocks = judged.model.backbone.get_intermediate_layers(images, 4)
        features = torch.cat([tokens[:, 0] for tokens in blocks], dim=1)
        expected = features @ content["weight"].T + content["bias"]
        assert torch.allclose(judged.model(images), expected, atol=1e-5)
    assert judged.classes == ["blue", "green", "red"]


def test_batches_do_not_change_the_curves(checkpoint, head, folders):
    judged = load_classifier(checkpoint, head, "teacher")
    photos = PhotoSet(folders[1], 32, judged.classes)
    saliency = Saliency(judged.model.backbone, 1)
    large, small = (
        curve_scores(measure(judged.model, saliency, photos, 8, Extraction(batch_size=size)))
        for size in (9, 2)
    )
    for name, scores in large.items():
        assert small[name] == pytest.approx(scores)
    shares = [large["occlusion"][f"{kind}_0.5_dropped"] for kind in ("salient", "nonsalient")]
    assert sum(shares) == pytest.approx(100)
    assert shares[0] <= 50  # the most attended patches are fewer


def test_bad_input_is_one_sentence_and_status_2(checkpoint, head, sets, folders, tmp_path, capsys):
    layer = ("--head", head)

    def refused(says: str, *also: object) -> None:
        with pytest.raises(SystemExit) as stopped:
            ibeton(call(checkpoint, "--json", tmp_path / "scores.json", *also))
        assert stopped.value.code == 2
        said = capsys.readouterr().err.strip()
        assert says in said
        assert len(said.splitlines()) == 1
        assert not (tmp_path / "scores.json").exists()

    refused("give at least one of", *layer)
    refused("--in9 and --in9-map go together", *layer, "--in9", tmp_path)
    refused("holds a backbone without a classifier", *sets)
    refused("trained on another backbone", *layer, "--network", "student", *sets)
    refused("is no layer of linear probing", "--head", checkpoint, *sets)
    refused("has no folders VARIANT/val", *layer, "--in9", tmp_path, "--in9-map", head)
    refused("--imagenet-c", *layer, "--imagenet-c", tmp_path / "nowhere")
    refused("fog/1/blue/1 is missing", *layer, "--imagenet-c", tmp_path / "c" / "fog" / "1")
    refused("nowhere does not exist", *layer, "--val", tmp_path / "nowhere")
    refused("there are heads 0 to 1", *layer, "--saliency-head", 2, *sets)
    refused("there is no folder", *layer, "--json", tmp_path / "no" / "scores.json", *sets)
    Path(folders[1], "red").rename(Path(folders[1], "crimson"))
    try:
        refused("classes that the training set lacks", *layer, "--val", folders[1])
    finally:
        Path(folders[1], "crimson").rename(Path(folders[1], "red"))


def test_a_head_is_kept_only_where_its_folder_is(checkpoint, folders, tmp_path, capsys):
    sets = ("--checkpoint", checkpoint, "--train", folders[0], "--val", folders[1])
    with pytest.raises(SystemExit) as stopped:
        ibeton([str(p) for p in ("linear", *sets, "--save-head", tmp_path / "no" / "head.pt")])
    assert stopped.value.code == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_fine_tuned_classifier_needs_no_head(checkpoint, folders, tmp_path):
    content = load_checkpoint(checkpoint)
    torch.manual_seed(0)
    model = new_classifier(checkpoint, 3)
    saved = {
        **classifier_state(model),
        "ema": None,
        "config": content["config"],
        "finetune": {"image_size": 32, "test_interpolation": "bilinear"},
        "classes": ["blue", "green", "red"],
    }
    save_checkpoint(tmp_path / "best.pt", saved)
    assert ibeton(call(tmp_path / "best.pt", "--imagenet-r", folders[1])) == 0
    report = json.loads((tmp_path / "best.robustness.imagenet_r.json").read_text())
    photos = PhotoSet(folders[1], 32, view=bilinear_view)
    images = normalized(torch.stack([photos[i][0] for i in range(len(photos))]), "cpu")
    with torch.no_grad():
        right = model.eval()(images).argmax(dim=1).numpy() == photos.labels
    top1 = report["scores"]["teacher"]["imagenet_r"]["top1"]
    assert top1 == pytest.approx(100 * right.mean())
