"""Mean average precision against scikit-learn, in parts and with ties."""

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.nn.functional import normalize

from ibeton.evaluation.frozen import retrieval
from ibeton.evaluation.frozen.retrieval import mean_average_precision


def test_it_is_the_mean_of_scikit_learns_average_precision(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    photos, queries = (normalize(torch.randn(n, 6, generator=generator), dim=1) for n in (80, 30))
    labels, own = (torch.randint(4, (n,), generator=generator) for n in (80, 30))
    similarity = (queries @ photos.T).numpy()
    expected = [
        average_precision_score((labels == label).numpy(), row)
        for label, row in zip(own, similarity, strict=True)
    ]
    for at_a_time in (1 << 24, 100):
        monkeypatch.setattr(retrieval, "_SIMILARITIES", at_a_time)
        found = mean_average_precision(photos, labels, queries, own)
        assert found == pytest.approx(100 * sum(expected) / 30, abs=1e-6)


def test_ties_stand_in_their_order_and_a_class_that_is_nowhere_counts_as_0():
    photos, query = torch.ones(4, 1), torch.ones(1, 1)
    for labels, expected in (([0, 1, 1, 1], 100), ([1, 1, 1, 0], 25), ([1, 0, 1, 0], 50)):
        found = mean_average_precision(photos, torch.tensor(labels), query, torch.tensor([0]))
        assert found == pytest.approx(expected)
    assert mean_average_precision(photos, torch.ones(4).long(), query, torch.tensor([0])) == 0
