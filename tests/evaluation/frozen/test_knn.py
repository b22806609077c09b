"""k-NN: the published figures, any number of photos and classes, photos through a real backbone."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from paths import REFERENCE
from photo_folders import COLORS, small_vit, write_photos
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from ibeton.evaluation.command import score_text
from ibeton.evaluation.frozen import knn
from ibeton.evaluation.frozen.features import Extraction, extract
from ibeton.evaluation.frozen.knn import (
    KS,
    RawPixels,
    centered_pixels,
    classify_by_k,
    classify_features,
    find_neighbors,
    vote,
)
from ibeton.evaluation.networks import untrained
from ibeton.evaluation.photos import PhotoSet
from ibeton.model.checkpoint import load_backbone

PUBLISHED = np.load(REFERENCE / "knn.npz")
SETS = ("set0", "set1", "set2")


def knn_classify(*sets: torch.Tensor, k: int = 1, **how) -> tuple[float, float]:
    return classify_by_k(*sets, [k], **how)[k]


def evaluate_knn(backbone, train, val, size: int, ks=KS) -> dict[int, tuple[float, float]]:
    first = PhotoSet(train, size)
    sets = (first, PhotoSet(val, size, first.classes))
    return classify_features(*(extract(backbone, s, ("cls",), Extraction()) for s in sets), ks)


def published_set(name: str) -> tuple[torch.Tensor, ...]:
    fields = ("train_features", "train_labels", "test_features", "test_labels")
    return tuple(torch.from_numpy(PUBLISHED[f"{name}/{field}"]) for field in fields)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(knn, "TRAIN_CHUNK", 97)
    monkeypatch.setattr(knn, "TEST_CHUNK", 13)
    monkeypatch.setattr(knn, "VOTES", 50)


@pytest.mark.parametrize("name", SETS)
def test_classes_that_no_photo_has_change_nothing(name):
    sets, ks = published_set(name), PUBLISHED[f"{name}/k"].tolist()
    own = int(PUBLISHED[f"{name}/num_classes"])
    assert classify_by_k(*sets, ks, 0.07, 1000) == classify_by_k(*sets, ks, 0.07, own)


@pytest.mark.parametrize("name", SETS)
def test_accuracies_are_the_published_ones(name):
    sets = published_set(name)
    num_classes = int(PUBLISHED[f"{name}/num_classes"])
    for j, temperature in enumerate(PUBLISHED[f"{name}/T"].tolist()):
        ks = PUBLISHED[f"{name}/k"].tolist()
        by_k = classify_by_k(*sets, ks, temperature, num_classes)
        for i, (top1, top5) in enumerate(by_k.values()):
            assert top1 == pytest.approx(PUBLISHED[f"{name}/top1"][i, j], abs=1e-9)
            low, high = PUBLISHED[f"{name}/top5_bounds"][i, j]
            assert low - 1e-9 <= top5 <= high + 1e-9
            if low == high:
                assert top5 == pytest.approx(PUBLISHED[f"{name}/top5"][i, j], abs=1e-9)


@pytest.mark.parametrize("classes", [1, 2, 30])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_top_1_is_scikit_learns_vote(classes, k):
    generator = torch.Generator().manual_seed(classes)
    train, test = (F.normalize(torch.randn(n, 5, generator=generator), dim=1) for n in (60, 40))
    labels, own = (torch.randint(classes, (n,), generator=generator) for n in (60, 40))
    theirs = KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train.double().numpy(), labels.numpy())
    right = (theirs.predict(test.double().numpy()) == own.numpy()).mean()
    assert knn_classify(train, labels, test, own, k=k)[0] == pytest.approx(100 * right)


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_tied_photos_and_tied_votes_are_scikit_learns(classes):
    """Each photo stands there six times, in classes that are often tied; all six vote."""
    train, test = torch.eye(12).repeat(6, 1), torch.eye(12)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        labels, own = (torch.randint(classes, (n,), generator=generator) for n in (72, 12))
        theirs = KNeighborsClassifier(6, metric="cosine").fit(train.numpy(), labels.numpy())
        said = torch.from_numpy(theirs.predict(test.numpy()))
        assert knn_classify(train, labels, test, said, k=6)[0] == 100
        right = float((said == own).double().mean())
        assert knn_classify(train, labels, test, own, k=6)[0] == pytest.approx(100 * right)


def test_one_k_alone_gives_the_figures_of_several_at_once():
    sets = published_set("set1")
    by_k = classify_by_k(*sets, [1, 20, 100])
    assert by_k == {k: knn_classify(*sets, k=k) for k in (1, 20, 100)}


@pytest.mark.parametrize("name", SETS)
def test_neighbors_are_the_published_ones(name):
    train, _, test, _ = published_set(name)
    similarity, index = find_neighbors(train, test, 20)
    assert np.array_equal(index, PUBLISHED[f"{name}/first_20_neighbours"])
    expected = (test @ train.T).gather(1, index)
    assert torch.allclose(similarity, expected, atol=1e-6, rtol=0)
    assert (similarity.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("name", SETS)
def test_small_chunks_give_the_same_figures(name, small_chunks):
    test_accuracies_are_the_published_ones(name)
    test_neighbors_are_the_published_ones(name)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_equally_similar_photos_go_by_their_order(k, small_chunks):
    photo = torch.eye(6)[:1]
    _, index = find_neighbors(photo.repeat(300, 1), photo.repeat(20, 1), k)
    assert torch.equal(index, torch.arange(k).repeat(20, 1))


def test_negative_and_zero_similarities_are_ordered_too(small_chunks):
    train = torch.tensor([[-1.0], [-0.0], [0.5], [-0.25], [0.0], [1.0]])
    similarity, index = find_neighbors(train, torch.ones(1, 1), 6)
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
    assert knn_classify(train, labels, train, labels, temperature=temperature) == (100.0, 100.0)


def test_fewer_classes_photos_and_questions_than_usual_are_fine():
    train, test = (
        F.normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0], [1.0, 0.0]]), dim=1),
        torch.eye(2),
    )
    train_labels, test_labels = torch.tensor([0, 1, 0]), torch.tensor([0, 1])
    assert knn_classify(train, train_labels, test, test_labels, k=200) == (100.0, 100.0)
    assert knn_classify(train, train_labels, test[:1], test_labels[:1], k=3) == (100.0, 100.0)


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
    names = ("train_features", "train_labels", "test_features", "test_labels")
    args = dict(zip(names, (torch.eye(2), torch.arange(2)) * 2, strict=True)) | change
    sets = [args.pop(name) for name in names]
    with pytest.raises(ValueError, match=message):
        knn_classify(*sets, **args)


def test_colors_are_told_apart_through_the_real_backbone(folders):
    result = evaluate_knn(small_vit(), *folders, 32, (1, 5, 200))
    assert list(result) == [1, 5, 200]
    assert result[1] == (100.0, 100.0)
    assert result[5][0] == 100.0
    train, val = centered_pixels(*folders, 32, Extraction())
    assert train["cls"].mean(dim=0).abs().max() < 1e-5
    assert classify_features(train, val, (5,))[5] == (100.0, 100.0)
    assert list(evaluate_knn(small_vit(), *folders, 32)) == list(KS)


def test_classes_are_matched_by_name(folders, tmp_path):
    val = write_photos(tmp_path / "val", {"red": COLORS["red"]}, 3)
    train_set = PhotoSet(folders[0], 16)
    assert PhotoSet(val, 16).labels.tolist() == [0, 0, 0]
    assert PhotoSet(val, 16, train_set.classes).labels.tolist() == [2, 2, 2]
    assert evaluate_knn(RawPixels(), folders[0], val, 16, (3,))[3][0] == 100.0


def test_classes_that_training_lacks_are_named(folders, tmp_path):
    val = write_photos(tmp_path / "val", {"red": COLORS["red"], "violet": (200, 40, 200)}, 1)
    with pytest.raises(ValueError, match="1 classes that the training set lacks"):
        evaluate_knn(RawPixels(), folders[0], val, 16)


def test_photos_without_classes_are_refused(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "alone.jpg")
    with pytest.raises(ValueError, match="1 photos without a class"):
        PhotoSet(tmp_path, 16)


def test_a_missing_set_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        PhotoSet(tmp_path / "nowhere", 16)


def test_the_untrained_backbone_is_seeded_and_differs_from_the_checkpoint(checkpoint):
    backbone, config = load_backbone(checkpoint)
    state = torch.random.get_rng_state()
    one, two = untrained(config)[0], untrained(config)[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
    assert not torch.equal(one.pos_embed, backbone.pos_embed)


def test_the_command_scores_every_k_of_checkpoint_untrained_and_pixels(
    checkpoint, folders, tmp_path, capsys
):
    sets = ["--checkpoint", checkpoint, "--train", folders[0], "--val", folders[1]]
    also = ["--untrained", "--pixels", "--json", tmp_path / "knn.json", "--cache", tmp_path]
    assert knn.main([str(a) for a in (*sets, *also, "--k", 5, 10, "--device", "cpu")]) == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "knn.json").read_text())
    assert report["image_size"] == 32
    assert list(report["scores"]) == ["teacher", "untrained"]
    expected = ["k5_top1", "k5_top5", "k10_top1", "k10_top5"]
    for name, protocols in report["scores"].items():
        scores = protocols["knn"]
        pixels = [f"pixels_{score}" for score in expected if name == "teacher"]  # once
        assert list(scores) == ["best_top1", *expected, *pixels]
        assert scores["best_top1"] == max(scores["k5_top1"], scores["k10_top1"])
        assert f"| {name} | {scores['best_top1']:.2f} |" in said
        by_k = evaluate_knn(
            load_backbone(checkpoint)[0]
            if name == "teacher"
            else untrained(load_backbone(checkpoint)[1])[0],
            *folders,
            32,
            (5,),
        )
        assert by_k[5] == pytest.approx((scores["k5_top1"], scores["k5_top5"]))


@pytest.mark.parametrize("missing", ["--checkpoint", "--train", "--val"])
def test_a_missing_path_is_one_sentence_and_exit_status_2(checkpoint, folders, missing, capsys):
    args = {"--checkpoint": checkpoint, "--train": folders[0], "--val": folders[1]}
    args |= {missing: "/nowhere/at/all", "--device": "cpu"}
    with pytest.raises(SystemExit) as stopped:
        knn.main([str(part) for pair in args.items() for part in pair])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "/nowhere/at/all" in said
    assert len(said.strip().splitlines()) == 1


def test_a_set_of_one_class_is_refused(checkpoint, tmp_path, capsys):
    red = {"red": COLORS["red"]}
    one, two = (str(write_photos(tmp_path / name, red, 2)) for name in ("train", "val"))
    with pytest.raises(SystemExit) as stopped:
        knn.main(["--checkpoint", str(checkpoint), "--train", one, "--val", two, "--device", "cpu"])
    assert stopped.value.code == 2
    assert "contain a single class" in capsys.readouterr().err


def test_photos_that_find_themselves_are_told(checkpoint, folders, tmp_path, capsys):
    (tmp_path / "link").symlink_to(folders[0])
    sets = ["--checkpoint", checkpoint, "--train", folders[0], "--val", tmp_path / "link"]
    assert knn.main([str(a) for a in (*sets, "--cache", tmp_path, "--device", "cpu")]) == 0
    assert "do not measure generalization" in capsys.readouterr().err


def test_scores_have_their_units_and_k_is_at_most_the_photos(checkpoint, folders, tmp_path, capsys):
    sets = ["--checkpoint", checkpoint, "--train", folders[0], "--val", folders[1]]
    also = ["--k", 5, 200, "--json", tmp_path / "knn.json", "--cache", tmp_path, "--device", "cpu"]
    assert knn.main([str(a) for a in (*sets, *also)]) == 0
    said = capsys.readouterr().out
    scores = json.loads((tmp_path / "knn.json").read_text())["scores"]["teacher"]["knn"]
    names = [name for name in scores if name.endswith("top1")]
    assert names == ["best_top1", "k5_top1", "k24_top1"]
    assert f"{scores['best_top1']:.2f} %" in said
    figures = {"top1": 7.0, "lr": 1e-3, "1%_labels": 1300, "head_clusters": 4, "jf_mean": 50.0}
    texts = [score_text(name, value) for name, value in figures.items()]
    assert texts == ["7.00 %", "0.001", "1,300", "4", "50.00 %"]
