"""Dropped patches and shuffled pieces: how many, which, and that nothing else changes."""

import pytest
import torch

from ibeton.evaluation.robustness.damage import (
    GRIDS,
    RATIOS,
    drop,
    nonsalient,
    orders,
    random_drops,
    salient,
    shuffle,
)


@pytest.mark.parametrize("patches", [16, 196])
def test_the_share_of_dropped_patches_is_the_ratio(patches):
    before = torch.zeros(3, patches, dtype=torch.bool)
    for ratio in RATIOS:
        drops = random_drops([5, 8, 900], patches, ratio, seed=0)
        assert drops.sum(dim=1).tolist() == [round(10 * ratio) * patches // 10] * 3
        assert (drops | ~before).all(), "patches came back at a higher ratio"
        before = drops
    assert not random_drops([5], patches, 0, seed=0).any()


def test_what_is_dropped_follows_from_seed_and_photo_alone():
    together = random_drops([3, 7], 196, 0.5, seed=1)
    assert torch.equal(together[1:], random_drops([7], 196, 0.5, seed=1))
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, random_drops([3, 7], 196, 0.5, seed=2))


def test_salient_patches_have_the_mass_and_are_the_fewest_that_do():
    torch.manual_seed(0)
    attention = torch.rand(6, 49).softmax(dim=1) ** 3
    shares = attention / attention.sum(dim=1, keepdim=True)
    for mass in RATIOS:
        kept = salient(attention, mass)
        for row, chosen in zip(shares, kept, strict=True):
            assert row[chosen].min() > row[~chosen].max()
            assert row[~chosen].sum() <= 1 - mass + 1e-6
            assert row[chosen].sum() >= mass - 1e-6
            assert row[chosen].sum() - row[chosen].min() <= mass + 1e-6, "one could be spared"
        assert torch.equal(nonsalient(attention, mass), ~salient(attention, 1 - mass))
    assert not salient(attention, 0).any()


def test_salient_patches_by_hand():
    attention = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert salient(attention, 0.5).tolist() == [[False, True, False, True]]
    assert salient(attention, 0.75).tolist() == [[False, True, True, True]]
    assert nonsalient(attention, 0.25).tolist() == [[True, False, False, False]]


def test_dropped_patches_are_zero_and_the_others_as_they_were():
    images = torch.rand(2, 3, 32, 32) + 1
    drops = torch.zeros(2, 16, dtype=torch.bool)
    drops[0, 1] = drops[1, 15] = True
    damaged = drop(images, drops)
    assert (damaged[0, :, :8, 8:16] == 0).all()
    assert (damaged[1, :, 24:, 24:] == 0).all()
    assert (damaged == 0).sum() == 2 * 3 * 64
    assert torch.equal(damaged[damaged != 0], images[damaged != 0])
    assert torch.equal(drop(images, drops & False), images)


@pytest.mark.parametrize("grid", [(1, 1), *GRIDS])
def test_the_identity_shuffle_changes_nothing(grid):
    images = torch.rand(2, 3, 224, 224)
    pieces = grid[0] * grid[1]
    same = torch.arange(pieces).expand(2, -1)
    assert torch.equal(shuffle(images, grid, same), images)
    order = orders([4, 9], pieces, seed=0)
    assert order.sort(dim=1).values.tolist() == same.tolist()
    mixed = shuffle(images, grid, order)
    assert torch.equal(mixed.flatten().sort().values, images.flatten().sort().values)
    assert torch.equal(shuffle(mixed, grid, order.argsort(dim=1)), images)


def test_pieces_go_where_the_order_says():
    images = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    mixed = shuffle(images, (2, 1), torch.tensor([[1, 0]]))
    assert torch.equal(mixed[0, 0], torch.cat([images[0, 0, 2:], images[0, 0, :2]]))
    with pytest.raises(ValueError, match="3 x 1 does not divide 4 pixels"):
        shuffle(images, (3, 1), torch.tensor([[0, 1, 2]]))
