"""k-NN: the published figures, any number of photos and classes, photos through a real backbone."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

from evaluation import knn
from evaluation.features import MEAN, STD, PhotoSet, extract_features
from evaluation.knn import (
    KS,
    RawPixels,
    classify_by_k,
    evaluate_knn,
    find_neighbours,
    knn_classify,
    vote,
)
from model.checkpoint import load_backbone, model_state, save_checkpoint
from model.config import ModelConfig
from model.ibot import build
from model.vit import VisionTransformer

ROOT = Path(__file__).parents[2]
PUBLISHED = np.load(ROOT / "tests" / "reference" / "knn.npz")
SETS = ("set0", "set1", "set2")


def published_set(name: str) -> tuple[torch.Tensor, ...]:
    fields = ("train_features", "train_labels", "test_features", "test_labels")
    return tuple(torch.from_numpy(PUBLISHED[f"{name}/{field}"]) for field in fields)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(knn, "TRAIN_CHUNK", 97)
    monkeypatch.setattr(knn, "TEST_CHUNK", 13)
    monkeypatch.setattr(knn, "VOTES", 50)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("classes", ["own", 1000])
def test_accuracies_are_the_published_ones(name, classes):
    sets = published_set(name)
    num_classes = int(PUBLISHED[f"{name}/num_classes"]) if classes == "own" else classes
    for j, temperature in enumerate(PUBLISHED[f"{name}/T"].tolist()):
        ks = PUBLISHED[f"{name}/k"].tolist()
        by_k = classify_by_k(*sets, ks, temperature, num_classes)
        for i, (top1, top5) in enumerate(by_k.values()):
            assert top1 == pytest.approx(PUBLISHED[f"{name}/top1"][i, j], abs=1e-9)
            low, high = PUBLISHED[f"{name}/top5_bounds"][i, j]
            assert low - 1e-9 <= top5 <= high + 1e-9
            if low == high:
                assert top5 == pytest.approx(PUBLISHED[f"{name}/top5"][i, j], abs=1e-9)


def test_one_k_alone_gives_the_figures_of_several_at_once():
    sets = published_set("set1")
    by_k = classify_by_k(*sets, [1, 20, 100])
    assert by_k == {k: knn_classify(*sets, k) for k in (1, 20, 100)}


@pytest.mark.parametrize("name", SETS)
def test_neighbours_are_the_published_ones(name):
    train, _, test, _ = published_set(name)
    similarity, index = find_neighbours(train, test, 20)
    assert np.array_equal(index, PUBLISHED[f"{name}/first_20_neighbours"])
    expected = (test @ train.T).gather(1, index)
    assert torch.allclose(similarity, expected, atol=1e-6, rtol=0)
    assert (similarity.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("name", SETS)
def test_small_chunks_give_the_same_figures(name, small_chunks):
    test_accuracies_are_the_published_ones(name, "own")
    test_neighbours_are_the_published_ones(name)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_equally_similar_photos_go_by_their_order(k, small_chunks):
    photo = torch.eye(6)[:1]
    _, index = find_neighbours(photo.repeat(300, 1), photo.repeat(20, 1), k)
    assert torch.equal(index, torch.arange(k).repeat(20, 1))


def test_negative_and_zero_similarities_are_ordered_too(small_chunks):
    train = torch.tensor([[-1.0], [-0.0], [0.5], [-0.25], [0.0], [1.0]])
    similarity, index = find_neighbours(train, torch.ones(1, 1), 6)
    assert index.tolist() == [[5, 2, 1, 4, 3, 0]]
    assert similarity.tolist() == [[1.0, 0.5, 0.0, 0.0, -0.25, -1.0]]


def test_votes_add_up_within_a_class():
    similarity = torch.tensor([[0.9, 0.8, 0.8, 0.1]])
    labels = torch.tensor([[0, 1, 1, 2]])
    # exp(0.9 / 1) < 2 exp(0.8 / 1), but at 0.07 the nearest photo alone weighs more
    assert vote(similarity, labels, torch.tensor([1]), 1.0, 3) == (100.0, 100.0)
    assert vote(similarity, labels, torch.tensor([1]), 0.07, 3) == (0.0, 100.0)


def test_tied_classes_go_by_number_and_a_class_without_votes_is_never_right():
    similarity, labels = torch.ones(1, 6), torch.tensor([[5, 4, 3, 2, 1, 0]])
    places = [vote(similarity, labels, torch.tensor([c]), 0.07, 8) for c in range(8)]
    assert places == [(100.0, 100.0), *[(0.0, 100.0)] * 4, *[(0.0, 0.0)] * 3]


@pytest.mark.parametrize("temperature", [1e-3, 0.07, 1e3])
def test_any_temperature_keeps_the_nearest_vote(temperature):
    train = F.normalize(torch.eye(4) + 0.1, dim=1)
    labels = torch.arange(4)
    assert knn_classify(train, labels, train, labels, 1, temperature) == (100.0, 100.0)


def test_fewer_classes_photos_and_questions_than_usual_are_fine():
    train, test = (
        F.normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0], [1.0, 0.0]]), dim=1),
        torch.eye(2),
    )
    train_labels, test_labels = torch.tensor([0, 1, 0]), torch.tensor([0, 1])
    assert knn_classify(train, train_labels, test, test_labels, 200) == (100.0, 100.0)
    assert knn_classify(train, train_labels, test[:1], test_labels[:1], 3) == (100.0, 100.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "--k holds 0"),
        ({"temperature": 0.0}, "--temperature is 0"),
        ({"num_classes": 1}, "labels must lie in 0 .. 0"),
        ({"train_labels": torch.tensor([0, -1])}, "labels must lie"),
        ({"train_labels": torch.tensor([0])}, "one label a feature"),
        ({"test_features": torch.eye(3)[:2]}, "of one width"),
        ({"test_features": torch.full((2, 2), float("nan"))}, "NaN"),
        (
            {"test_features": torch.empty(0, 2), "test_labels": torch.empty(0).long()},
            "one test photo",
        ),
    ],
)
def test_impossible_questions_are_named(change, message):
    args = {"train_features": torch.eye(2), "train_labels": torch.arange(2)}
    args |= {"test_features": torch.eye(2), "test_labels": torch.arange(2), "k": 1} | change
    with pytest.raises(ValueError, match=message):
        knn_classify(**args)


def write_photos(folder: Path, classes: dict[str, tuple[int, int, int]], each: int) -> Path:
    """Write `each` noisy photos of one colour for each class, of several shapes."""
    noise = np.random.default_rng(len(classes) * 100 + each)
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            shape = ((40, 60), (60, 40), (48, 48), (100, 33))[i % 4]
            pixels = np.array(colour) + noise.normal(0, 40, (*shape, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / name / f"{i}.jpg", quality=95)
    return folder


COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("photos")
    return write_photos(root / "train", COLOURS, 8), write_photos(root / "val", COLOURS, 3)


def small_vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(embed_dim=32, depth=2, num_heads=2, patch_size=8, image_size=32)


def test_views_are_torchvisions_resize_and_centre_crop(folders):
    for size, shorter_side in ((32, 37), (224, 256)):
        photos = PhotoSet(folders[0], size)
        files = sorted(folders[0].rglob("*.jpg"))
        expected = transforms.Compose(
            [
                transforms.Resize(shorter_side, interpolation=3),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )
        views = torch.stack([expected(Image.open(file)) for file in files])
        features, labels = extract_features(RawPixels(), photos, batch_size=5)
        assert torch.allclose(features, views.flatten(1), atol=1e-5, rtol=0)
        assert labels.tolist() == [sorted(COLOURS).index(file.parent.name) for file in files]


def test_features_are_the_class_tokens_and_the_backbone_is_left_as_it_was(folders):
    backbone, photos = small_vit().train(), PhotoSet(folders[1], 32)
    backbone.blocks[1].eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    features, _ = extract_features(backbone, photos, batch_size=4)
    assert features.shape == (9, 32)
    assert features.dtype == torch.float32
    assert not features.is_inference()
    assert backbone.training
    assert not backbone.blocks[1].training
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    images = torch.stack([photos[i][0] for i in range(9)]).float() / 255
    images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = backbone.eval()(images)[:, 0]
    assert torch.allclose(features, expected, atol=1e-5)


def test_batch_size_and_worker_processes_do_not_change_the_features(folders):
    backbone, photos = small_vit(), PhotoSet(folders[1], 32)
    alone, labels = extract_features(backbone, photos, batch_size=1)
    for batch_size, workers in ((9, 0), (4, 1)):
        features, again = extract_features(backbone, photos, "cpu", batch_size, workers)
        assert torch.allclose(features, alone, atol=1e-5)
        assert torch.equal(labels, again)


def test_colours_are_told_apart_through_the_real_backbone(folders):
    result = evaluate_knn(small_vit(), *folders, image_size=32, ks=(1, 5, 200))
    assert list(result) == [1, 5, 200]
    assert result[1] == (100.0, 100.0)
    assert result[5][0] == 100.0
    pixels = evaluate_knn(RawPixels(), *folders, image_size=32, ks=(5,), centred=True)
    assert pixels[5] == (100.0, 100.0)
    assert list(evaluate_knn(small_vit(), *folders, image_size=32)) == list(KS)


def test_an_unreadable_photo_is_named_counted_and_left_out(folders, tmp_path, caplog):
    val = write_photos(tmp_path / "val", COLOURS, 2)
    (val / "green" / "0.jpg").write_bytes(b"no photo")
    with caplog.at_level(logging.WARNING):
        features, labels = extract_features(RawPixels(), PhotoSet(val, 16), batch_size=2)
    assert labels.tolist() == [0, 0, 1, 2, 2]
    assert len(features) == 5
    assert "0.jpg" in caplog.text
    assert "1 of 6 photos" in caplog.text
    for photo in val.rglob("*.jpg"):
        photo.write_bytes(b"no photo")
    with pytest.raises(ValueError, match="none of the 6 photos"):
        extract_features(RawPixels(), PhotoSet(val, 16))


def test_classes_are_matched_by_name(folders, tmp_path):
    val = write_photos(tmp_path / "val", {"red": COLOURS["red"]}, 3)
    train_set = PhotoSet(folders[0], 16)
    assert PhotoSet(val, 16).labels.tolist() == [0, 0, 0]
    assert PhotoSet(val, 16, train_set.classes).labels.tolist() == [2, 2, 2]
    assert evaluate_knn(RawPixels(), folders[0], val, 16, (3,))[3][0] == 100.0


def test_classes_that_training_lacks_are_named(folders, tmp_path):
    val = write_photos(tmp_path / "val", {"red": COLOURS["red"], "violet": (200, 40, 200)}, 1)
    with pytest.raises(ValueError, match="1 classes that the training set lacks"):
        evaluate_knn(RawPixels(), folders[0], val, 16)


def test_photos_without_classes_are_refused(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "alone.jpg")
    with pytest.raises(ValueError, match="1 photos without a class"):
        PhotoSet(tmp_path, 16)


def test_a_missing_set_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        PhotoSet(tmp_path / "nowhere", 16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}
    head = {"out_dim": 16, "patch_out_dim": 16, "hidden_dim": 16, "bottleneck_dim": 8}
    config = ModelConfig(**sizes, **head)
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    save_checkpoint(path, model_state(build(config)) | {"config": asdict(config)})
    return path


def command_line(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "evaluation.knn", *map(str, args), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_command_prints_and_writes_every_figure(checkpoint, folders, tmp_path):
    sets = ("--checkpoint", checkpoint, "--train", folders[0], "--val", folders[1])
    also = ("--untrained", "--pixels", "--json", tmp_path / "knn.json")
    done = command_line(*sets, "--k", 5, 10, "--workers", 0, *also)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "knn.json").read_text())
    assert report["image_size"] == 32
    assert list(report["results"]) == ["teacher", "untrained", "raw pixels"]
    for name, by_k in report["results"].items():
        assert list(by_k) == ["5", "10"]
        assert name in done.stdout
        for top1, top5 in by_k.values():
            assert f"{top1:.2f}" in done.stdout
            assert 0 <= top1 <= top5 <= 100


def test_the_untrained_backbone_is_seeded_and_differs_from_the_checkpoint(checkpoint):
    backbone, config = load_backbone(checkpoint)
    state = torch.random.get_rng_state()
    one, two = knn.untrained_backbone(config), knn.untrained_backbone(config)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
    assert not torch.equal(one.pos_embed, backbone.pos_embed)


@pytest.mark.parametrize("missing", ["--checkpoint", "--train", "--val"])
def test_a_missing_path_is_one_sentence_and_exit_status_2(checkpoint, folders, missing, capsys):
    args = {"--checkpoint": checkpoint, "--train": folders[0], "--val": folders[1]}
    args |= {missing: "/nowhere/at/all", "--workers": 0, "--device": "cpu"}
    with pytest.raises(SystemExit) as stopped:
        knn.main([str(part) for pair in args.items() for part in pair])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "/nowhere/at/all" in said
    assert len(said.strip().splitlines()) == 1
