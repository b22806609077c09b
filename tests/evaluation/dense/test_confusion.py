import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, recall_score

from ibeton.evaluation.dense.segmentation_data import confusion, scores

NAMES = ["a", "b", "c"]


def test_scores_of_a_matrix_worked_by_hand():
    truth = torch.tensor([[0, 0, 0, 0], [1, 1, 255, 255]], dtype=torch.uint8)
    said = torch.tensor([[0, 0, 0, 1], [1, 0, 2, 0]])
    matrix = confusion(truth, said, 3, 255)
    assert matrix.tolist() == [[3, 1, 0], [1, 1, 0], [0, 0, 0]]
    found = scores(matrix.numpy(), NAMES)
    # a: 3 of 3 + 1 + 1, b: 1 of 1 + 1 + 1; c occurs nowhere. Accuracy 3 of 4 and 1 of 2.
    assert math.isclose(found["miou"], 100 * (3 / 5 + 1 / 3) / 2)
    assert math.isclose(found["macc"], 100 * (3 / 4 + 1 / 2) / 2)
    assert math.isclose(found["aacc"], 100 * 4 / 6)
    assert math.isclose(found["majority_miou"], 100 * (4 / 6 + 0) / 2)
    assert "iou/c" not in found
    assert math.isclose(found["iou/b"], 100 / 3)


def test_a_class_that_is_only_predicted_counts_against_the_mean():
    found = scores(np.array([[2, 0, 1], [0, 3, 0], [0, 0, 0]]), NAMES)
    assert found["iou/c"] == 0
    assert math.isclose(found["miou"], 100 * (2 / 3 + 1 + 0) / 3)
    assert math.isclose(found["macc"], 100 * (2 / 3 + 1) / 2)


def test_a_set_without_a_labeled_pixel_is_refused():
    with pytest.raises(ValueError, match="no pixel"):
        scores(np.zeros((3, 3), np.int64), NAMES)


def test_scores_equal_scikit_learns_on_random_labels():
    rng = np.random.default_rng(0)
    truth, said = rng.integers(0, 7, (2, 40, 50))
    matrix = confusion(torch.from_numpy(truth), torch.from_numpy(said), 7, 255).numpy()
    assert np.array_equal(matrix, confusion_matrix(truth.ravel(), said.ravel()))
    found = scores(matrix, [str(i) for i in range(7)])
    iou = jaccard_score(truth.ravel(), said.ravel(), average=None)
    assert np.allclose([found[f"iou/{i}"] for i in range(7)], 100 * iou)
    assert math.isclose(found["miou"], 100 * iou.mean())
    recall = recall_score(truth.ravel(), said.ravel(), average="macro")
    assert math.isclose(found["macc"], 100 * recall)
    assert math.isclose(found["aacc"], 100 * accuracy_score(truth.ravel(), said.ravel()))


def test_matrices_of_parts_add_up_to_that_of_the_whole():
    truth, said = torch.randint(0, 4, (2, 6, 8, 8), generator=torch.Generator().manual_seed(0))
    parts = sum(confusion(t, s, 4, 255) for t, s in zip(truth, said, strict=True))
    assert torch.equal(parts, confusion(truth, said, 4, 255))
