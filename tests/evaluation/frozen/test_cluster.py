"""Agreement of clusters with classes: published figures, brute force, degenerate cases."""

from itertools import permutations

import numpy as np
import pytest
import torch
from paths import REFERENCE
from photo_folders import COLORS

from ibeton.evaluation.frozen.cluster import agreement, chance_fmi, hungarian_accuracy, kmeans

PUBLISHED = np.load(REFERENCE / "clustering.npz")
CASES = sorted({name.split("/")[0] for name in PUBLISHED.files})


@pytest.mark.parametrize("case", CASES)
def test_the_published_figures(case):
    labels, clusters = PUBLISHED[f"{case}/labels"], PUBLISHED[f"{case}/pred"]
    found = agreement(labels, clusters)
    for name in ("nmi", "ari", "fmi"):
        assert found[name] == pytest.approx(100 * float(PUBLISHED[f"{case}/{name}"]), abs=1e-9)
    accuracy = float(PUBLISHED[f"{case}/acc"])
    if accuracy >= 0:  # the published code wants as many clusters as classes
        assert found["acc"] == pytest.approx(100 * accuracy, abs=1e-9)
    assert found["clusters"] == len(np.unique(clusters))


def best_of_all_matchings(labels, clusters):
    classes, names = np.unique(labels), list(np.unique(clusters))
    names += [None] * max(0, len(classes) - len(names))
    return max(
        sum(
            int(((labels == c) & (clusters == name)).sum())
            for c, name in zip(classes, chosen, strict=False)
            if name is not None
        )
        for chosen in permutations(names, len(classes))
    ) / len(labels)


@pytest.mark.parametrize("classes", [1, 2, 4])
@pytest.mark.parametrize("clusters", [1, 3, 4, 6])
def test_the_matching_is_the_best_of_all(classes, clusters):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        labels, found = rng.integers(0, classes, 30), 100 * rng.integers(0, clusters, 30)
        expected = best_of_all_matchings(labels, found)
        assert hungarian_accuracy(labels, found) == pytest.approx(expected)


def pair_counting(labels, clusters):
    """ARI and FMI in percent by looking at every pair of photos."""
    above = np.triu_indices(len(labels), 1)
    same_class = (labels[:, None] == labels)[above]
    same_cluster = (clusters[:, None] == clusters)[above]
    both, classes, found = (same_class & same_cluster).sum(), same_class.sum(), same_cluster.sum()
    expected, most = classes * found / len(same_class), (classes + found) / 2
    ari = 1.0 if most == expected else (both - expected) / (most - expected)
    return 100 * ari, 100 * both / np.sqrt(float(classes * found)) if both else 0.0


def mutual_information(labels, clusters):
    """NMI in percent, with the arithmetic mean of the entropies."""
    joint = np.array([[((labels == a) & (clusters == b)).mean() for b in set(clusters)]
                      for a in set(labels)])  # fmt: skip
    classes, found = joint.sum(1), joint.sum(0)
    entropies = [-(p * np.log(p)).sum() for p in (classes, found)]
    if max(entropies) == 0:
        return 100.0
    inside = joint > 0
    information = joint[inside] * np.log((joint / np.outer(classes, found))[inside])
    return 100 * information.sum() / (sum(entropies) / 2)


@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("clusters", [1, 2, 9])
def test_ari_nmi_and_fmi_are_what_their_definitions_say(classes, clusters):
    rng = np.random.default_rng(10 * classes + clusters)
    labels, found = rng.integers(0, classes, 40), rng.integers(0, clusters, 40)
    scores = agreement(labels, found)
    ari, fmi = pair_counting(labels, found)
    assert scores["ari"] == pytest.approx(ari, abs=1e-6)
    assert scores["fmi"] == pytest.approx(fmi, abs=1e-6)
    assert scores["nmi"] == pytest.approx(mutual_information(labels, found), abs=1e-6)


def test_names_of_clusters_do_not_matter_and_ties_are_counted_once():
    labels = np.array([0, 0, 1, 1])
    assert hungarian_accuracy(labels, np.array([7, 7, 3, 3])) == 1
    assert hungarian_accuracy(labels, np.array([0, 1, 0, 1])) == 0.5
    assert hungarian_accuracy(labels, np.array([0, 1, 2, 3])) == 0.5
    assert agreement(labels, labels * 9) == {
        **{"acc": 100, "ari": 100, "nmi": 100, "fmi": 100, "clusters": 2},
        "fmi_chance": pytest.approx(100 / 3),
    }


def test_chance_is_the_mean_over_all_clusterings_of_these_sizes():
    labels, clusters = np.array([0, 0, 0, 1, 1, 2]), np.array([4, 4, 4, 4, 8, 9])
    shuffles = [np.array(order) for order in permutations(clusters.tolist())]
    expected = np.mean([pair_counting(labels, shuffle)[1] for shuffle in shuffles])
    assert 100 * chance_fmi(labels, clusters) == pytest.approx(expected)
    assert chance_fmi(labels, np.arange(6)) == 0
    assert chance_fmi(np.zeros(6), np.ones(6)) == 1
    assert chance_fmi(np.array([3]), np.array([5])) == 0, "no pair, nothing to agree on"


def test_lists_that_do_not_fit_are_refused():
    for labels, clusters in (([0, 1], [0]), ([], []), ([[0]], [[0]])):
        with pytest.raises(ValueError, match="two lists of one length"):
            hungarian_accuracy(np.array(labels), np.array(clusters))


def test_k_means_finds_clusters_that_lie_apart():
    generator = torch.Generator().manual_seed(0)
    centers = 10 * torch.randn(len(COLORS), 4, generator=generator)
    labels = torch.arange(60) % 3
    points = centers[labels] + torch.randn(60, 4, generator=generator)
    found = kmeans(points[:45], points[45:], 3)
    assert hungarian_accuracy(labels[45:].numpy(), found) == 1
    assert len(kmeans(points[:2], points, 3)) == 60
