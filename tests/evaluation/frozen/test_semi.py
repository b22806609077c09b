"""Subsets of few labels."""

import pytest
import torch

from ibeton.evaluation.frozen.semi import balanced_subset


def test_a_subset_has_equally_many_of_each_class():
    labels = torch.arange(1000) % 10
    for share, each in ((0.01, 1), (0.1, 10), (1, 100)):
        rows = balanced_subset(labels, share)
        assert labels[rows].bincount().tolist() == [each] * 10
        assert len(set(rows.tolist())) == 10 * each


def test_every_class_has_at_least_one_photo_and_small_ones_give_all():
    labels = torch.tensor([0] * 90 + [1] * 3 + [5])
    assert labels[balanced_subset(labels, 0.001)].tolist() == [0, 1, 5]
    assert labels[balanced_subset(labels, 0.5)].bincount().tolist() == [16, 3, 0, 0, 0, 1]


def test_the_subset_follows_from_the_seed():
    labels = torch.arange(300) % 3
    assert torch.equal(balanced_subset(labels, 0.1, 4), balanced_subset(labels, 0.1, 4))
    assert not torch.equal(balanced_subset(labels, 0.1, 4), balanced_subset(labels, 0.1, 5))


@pytest.mark.parametrize("share", [0, -0.1, 1.5])
def test_a_share_beyond_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match="share of"):
        balanced_subset(torch.zeros(3).long(), share)
