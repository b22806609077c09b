"""Linear probing: every learning rate as if it were alone, on stored features or computed anew."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from photo_folders import small_vit

from ibeton.evaluation.command import Task
from ibeton.evaluation.frozen.features import Extraction, extract
from ibeton.evaluation.frozen.heads import RATES, LinearSettings, train_head_reference, train_heads
from ibeton.evaluation.frozen.linear import (
    augmented,
    best_scores,
    feature_names,
    linear_scores,
    shuffled,
)
from ibeton.evaluation.photos import PhotoSet

CLASSES = 5


def random_set(photos, seed):
    """Features of clusters that overlap, float32 [n, 12], and labels."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(CLASSES, (photos,), generator=generator)
    return centers[labels] + 1.5 * torch.randn(photos, 12, generator=generator), labels


TRAIN, VAL = random_set(150, 1), random_set(90, 2)


def sweep(**settings):
    chosen = LinearSettings(**{"epochs": 7, "batch_size": 64, **settings})
    return train_heads(shuffled(*TRAIN, chosen), *VAL, CLASSES, chosen)


@pytest.mark.parametrize("classes", [1, CLASSES])
def test_each_rate_gives_what_training_that_head_alone_gives(classes):
    rates = (1e-4, 0.02, 0.5, 9.0)
    (train, labels), (val, val_labels) = ((x, y % classes) for x, y in (TRAIN, VAL))
    settings = LinearSettings(7, 64, rates)
    asked = (shuffled(train, labels, settings), val, val_labels, classes)
    heads, accuracies = train_heads(*asked, settings)
    for i, rate in enumerate(rates):
        layer, expected = train_head_reference(*asked, LinearSettings(7, 64, (rate,)))
        torch.testing.assert_close(heads.weight[:, i], layer.weight.data, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(heads.bias[:, i], layer.bias.data, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(accuracies[:, i], expected, atol=1e-4)
    assert len({tuple(column) for column in accuracies.T}) == (4 if classes > 1 else 1)


def test_every_published_rate_comes_out_as_it_does_alone():
    """Up to 9 x 4, where layers diverge as they do alone."""
    settings = LinearSettings(5, 1024)
    accuracies = train_heads(shuffled(*TRAIN, settings), *VAL, CLASSES, settings)[1]
    for i, rate in enumerate(RATES):
        one = LinearSettings(5, 1024, (rate,))
        expected = train_head_reference(shuffled(*TRAIN, one), *VAL, CLASSES, one)[1]
        np.testing.assert_allclose(accuracies[:, i], expected, atol=1e-4)


def test_a_head_does_not_depend_on_which_others_are_trained_with_it():
    together = sweep(rates=(0.01, 0.3))[0]
    torch.testing.assert_close(sweep(rates=(0.3,))[0].weight[:, 0], together.weight[:, 1])


def test_the_rates_are_the_published_ones():
    assert len(RATES) == 45
    assert RATES[0] == pytest.approx(1e-4)
    assert RATES[-1] == pytest.approx(9)
    assert LinearSettings() == LinearSettings(100, 1024, RATES)


def test_an_epoch_sees_every_photo_once_in_an_order_of_its_own():
    numbers = torch.arange(10).float().unsqueeze(1)
    batches = shuffled(numbers, torch.arange(10), LinearSettings(batch_size=4))
    orders = [torch.cat([labels for _, labels in batches(epoch)]).tolist() for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert all(torch.equal(f[:, 0].long(), y) for f, y in batches(0))


def test_scores_are_those_of_the_best_rate_at_its_best_epoch():
    accuracies = np.array([[10.0, 60.0, 20.0], [50.0, 30.0, 40.0]])
    scores = best_scores(accuracies, LinearSettings(2, rates=(0.1, 0.2, 0.3)))
    assert scores == {"top1": 60.0, "lr": 0.2, "epoch": 1, "last_epoch_top1": 50.0}


def task(folders, **args) -> Task:
    backbone, how = small_vit(), Extraction(batch_size=5)
    sets = [PhotoSet(folder, 32) for folder in folders]
    features = [extract(backbone, photos, ("blocks",), how) for photos in sets]
    given = {"epochs": 20, "sgd_batch": 7, "lr": [0.1, 1.0], "augmented": False, **args}
    return Task(*features, 3, Namespace(**given), {"arch": "vit_s"}, how, backbone, sets[0])


def test_colors_are_told_apart_with_and_without_random_views(folders):
    assert linear_scores(task(folders))["top1"] == 100
    assert linear_scores(task(folders, augmented=True, epochs=4))["top1"] == 100


@pytest.mark.parametrize("at_a_time", [5, 24])
def test_random_views_give_all_photos_with_their_labels_in_batches_of_sgd(folders, at_a_time):
    photos, how = PhotoSet(folders[0], 32), Extraction(batch_size=at_a_time)
    batches = augmented(small_vit(), photos, ("blocks",), how, LinearSettings(batch_size=7))
    epochs = [list(batches(epoch)) for epoch in (0, 0, 1)]
    for epoch in epochs:
        assert [len(labels) for _, labels in epoch] == [7, 7, 7, 3]
        assert torch.cat([y for _, y in epoch]).bincount().tolist() == [8, 8, 8]
    first, again, later = (torch.cat([f for f, _ in epoch]) for epoch in epochs)
    assert torch.equal(first, again)
    assert not torch.allclose(first.sort(0).values, later.sort(0).values, atol=1e-3)


def test_large_vits_are_probed_on_class_token_and_mean_patch():
    assert feature_names({"arch": "vit_b"}) == feature_names({"arch": "vit_l"})
    assert feature_names({"arch": "vit_l"}) == ("cls", "patch_mean")
    for arch in ("vit_t", "vit_s", "swin_t7"):
        assert feature_names({"arch": arch}) == ("blocks",)


@pytest.mark.parametrize("bad", [{"epochs": 0}, {"batch_size": 0}, {"rates": ()}, {"rates": (0,)}])
def test_settings_that_cannot_work_are_named(bad):
    with pytest.raises(ValueError, match="--"):
        sweep(**bad)
