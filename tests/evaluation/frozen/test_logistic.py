"""Logistic regression against scikit-learn, and what is held out."""

from types import SimpleNamespace

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import normalize

from ibeton.evaluation.frozen import logistic
from ibeton.evaluation.frozen.logistic import fit_logistic, split_held_out, top1


def random_set(photos, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(classes, (photos,), generator=generator)
    features = centers[labels] + torch.randn(photos, 10, generator=generator)
    return normalize(features, dim=1), labels


@pytest.mark.parametrize("strength", [0.0001, 0.01, 1.0])
def test_it_is_scikit_learns_multinomial_regression(strength, monkeypatch):
    monkeypatch.setattr(logistic, "_LOGITS", 4 * 70)
    features, labels = random_set(240, 4, 1)
    weight = fit_logistic(features, labels, 4, strength)
    expected = LogisticRegression(
        C=1 / (strength * len(labels)), fit_intercept=False, tol=1e-8, max_iter=2000
    )
    expected.fit(features.double().numpy(), labels.numpy())
    test, test_labels = random_set(300, 4, 2)
    ours = (test @ weight).softmax(1)
    theirs = torch.from_numpy(expected.predict_proba(test.double().numpy())).float()
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=0)
    assert top1(weight, test, test_labels) == pytest.approx(
        100 * expected.score(test.numpy(), test_labels.numpy()), abs=0.7
    )


def test_a_class_that_is_not_in_the_training_set_is_allowed_and_never_said():
    features, labels = random_set(60, 3, 3)
    weight = fit_logistic(features, labels, 5, 0.1)
    assert weight.shape == (10, 5)
    assert set((features @ weight).argmax(1).tolist()) <= {0, 1, 2}


def test_logits_of_many_classes_are_few_photos_at_a_time(monkeypatch):
    """The memory is bounded by photos x classes."""
    sizes = []

    def cross_entropy(logits, labels, reduction):
        sizes.append(logits.numel())
        return torch.nn.functional.cross_entropy(logits, labels, reduction=reduction)

    monkeypatch.setattr(logistic, "_LOGITS", 60)
    monkeypatch.setattr(logistic, "F", SimpleNamespace(cross_entropy=cross_entropy))
    fit_logistic(*random_set(40, 3, 3), 20, 0.1)
    assert max(sizes) == 60


def test_a_fifth_of_each_class_is_held_out_and_never_all_of_it():
    labels = torch.tensor([0] * 20 + [1] * 3 + [2] * 2 + [3])
    learn, held = split_held_out(labels)
    assert labels[held].bincount(minlength=4).tolist() == [4, 1, 0, 0]
    assert sorted(learn.tolist() + held.tolist()) == list(range(26))
    assert not torch.equal(held, split_held_out(labels, seed=1)[1])


# Weights [3, 3] of cyanure 1.2.2's Classifier(loss="multiclass-logistic", penalty="l2",
# lambda_1=strength, fit_intercept=False, tol=1e-10) for `cyanure_set`.
CYANURE = {
    0.01: [
        [1.71784, -0.76556, -0.95228],
        [-0.79763, 2.39045, -1.59282],
        [-0.41453, -1.65727, 2.0718],
    ],
    0.1: [
        [0.75697, -0.30876, -0.44821],
        [-0.37004, 0.85025, -0.48021],
        [-0.27959, -0.5419, 0.82149],
    ],
}


def cyanure_set():
    generator = torch.Generator().manual_seed(5)
    noise = normalize(torch.randn(40, 3, generator=generator, dtype=torch.float64), dim=1)
    labels = torch.arange(40) % 3
    return normalize(noise + torch.eye(3, dtype=torch.float64)[labels], dim=1), labels


@pytest.mark.parametrize("strength", CYANURE)
def test_the_strength_means_what_it_means_to_cyanure(strength):
    features, labels = cyanure_set()
    weight = fit_logistic(features.float(), labels, 3, strength)
    torch.testing.assert_close(weight, torch.tensor(CYANURE[strength]), atol=2e-4, rtol=0)
