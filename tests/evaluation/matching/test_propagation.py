"""Labels carried from patch to patch, against the same written plainly."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ibeton.evaluation.matching.propagation import (
    Propagation,
    carry,
    neighborhood,
    propagate,
    to_mask,
)


def carry_reference(
    target: Tensor, sources: Tensor, labels: Tensor, near: Tensor, how: Propagation
) -> Tensor:
    """`carry`, patch by patch."""
    out = torch.zeros(len(target), labels.shape[2], dtype=labels.dtype)
    for i, patch in enumerate(target):
        found = []
        for frame, own in zip(sources, labels, strict=True):
            for j in near[i].nonzero().flatten().tolist():
                likeness = float(torch.exp(patch @ frame[j] / how.temperature))
                found.append((likeness, own[j]))
        found.sort(key=lambda pair: -pair[0])
        total = sum(likeness for likeness, _ in found[: how.top])
        for likeness, label in found[: how.top]:
            out[i] += likeness / total * label
    return out


def test_carrying_equals_the_plain_loop():
    torch.manual_seed(0)
    grid, how = (5, 6), Propagation(radius=2, top=3)
    target, sources = (
        F.normalize(torch.randn(30, 8), dim=1),
        F.normalize(torch.randn(4, 30, 8), dim=2),
    )
    labels = torch.rand(4, 30, 3)
    near = neighborhood(*grid, how.radius)
    found = carry(target, sources, labels, near, how)
    assert torch.allclose(found, carry_reference(target, sources, labels, near, how), atol=1e-6)


def test_a_neighborhood_is_a_square_cut_off_at_the_edge():
    near = neighborhood(4, 5, 1).view(4, 5, 4, 5)
    assert near[0, 0].sum() == 4
    assert near[2, 2].sum() == 9
    assert near[2, 2, 1:4, 1:4].all()
    assert neighborhood(4, 5, 12).all()


def test_patches_that_move_take_their_labels_along():
    torch.manual_seed(1)
    grid = (6, 8)
    field = torch.randn(6, 8, 16)
    first = torch.zeros(6, 8, 2)
    first[..., 0] = 1
    first[2:4, 1:3] = torch.tensor([0.0, 1.0])
    frames = [field.roll(shift, dims=1).flatten(0, 1) for shift in range(5)]
    how = Propagation(temperature=0.01)
    for shift, found in enumerate(propagate(frames, first.flatten(0, 1), grid, how), start=1):
        moved = first.roll(shift, dims=1).flatten(0, 1)
        assert torch.equal(found.argmax(dim=1), moved.argmax(dim=1))
    assert shift == 4


def test_only_the_first_frame_and_the_last_few_are_looked_at(monkeypatch):
    looked = []
    patches = [torch.randn(4, 3) for _ in range(6)]
    labels = torch.eye(2)[[0, 0, 1, 1]]

    def look(target, sources, *rest):
        looked.append(sources)
        return carry(target, sources, *rest)

    monkeypatch.setattr("ibeton.evaluation.matching.propagation.carry", look)
    list(propagate(patches, labels, (2, 2), Propagation(previous=2)))
    normal = [F.normalize(one, dim=1) for one in patches]
    assert [len(sources) for sources in looked] == [1, 2, 3, 3, 3]
    assert torch.equal(looked[-1], torch.stack([normal[0], normal[3], normal[4]]))


def test_each_label_is_stretched_before_the_highest_is_taken():
    labels = torch.tensor([[0.9, 0.1], [0.6, 0.4]])  # background is higher everywhere
    mask = to_mask(labels, (1, 2), 4)
    assert mask.shape == (4, 8)
    assert (mask[:, :2] == 0).all()
    assert (mask[:, -2:] == 1).all()
    everywhere = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert np.array_equal(to_mask(everywhere, (1, 2), 2), np.zeros((2, 4)))
