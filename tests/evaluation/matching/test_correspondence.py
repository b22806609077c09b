"""`ibeton correspondence`: patches that two views share, and whether they are found."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibeton.__main__ import main as ibeton
from ibeton.evaluation.matching.correspondence import chance, count_right, true_places
from ibeton.evaluation.matching.views import cut_two, draw_two, in_photo, in_view
from ibeton.pipeline.sampling.draws import DRAW


def boxes(**values: object) -> np.ndarray:
    draws = np.zeros(2, dtype=DRAW)
    for name, value in values.items():
        draws[name] = value
    return draws


def test_a_shifted_view_has_shifted_patches():
    draws = boxes(top=(0, 16), left=(0, 8), height=64, width=64)
    places, true = true_places(draws, 64, 8)  # patches of the photo's own pixels, 8 x 8 of them
    rows, columns = np.divmod(places, 8)
    assert (rows.min(), columns.min(), len(places)) == (2, 1, 6 * 7)
    assert np.array_equal(true, (rows - 2) * 8 + columns - 1)
    draws["flip"] = (0, 1)
    places, true = true_places(draws, 64, 8)
    rows, columns = np.divmod(places, 8)
    assert np.array_equal(true, (rows - 2) * 8 + 7 - (columns - 1))


def test_patches_said_to_be_the_same_look_the_same():
    """In a photo whose colors say where each pixel is, drawn as the command draws."""
    y, x = np.mgrid[:200, :240]
    image = Image.fromarray(np.stack((x, y, 0 * x), axis=2).astype(np.uint8))
    for index in range(4):
        draws = draw_two(image, 64, index)
        plain = boxes(**{n: draws[n] for n in ("top", "left", "height", "width", "flip")})
        views = cut_two(image, plain, 64).float()
        means = views[:, :2].unflatten(3, (8, 8)).unflatten(2, (8, 8)).mean(dim=(3, 5))
        first, second = means.flatten(2).transpose(1, 2)  # [64, 2]
        places, true = true_places(draws, 64, 8)
        assert len(places) > 5
        nearest = torch.cdist(first[places], second).argmin(dim=1).numpy()
        assert count_right(nearest, true, 8, 1) == len(places)
        assert count_right(nearest, true, 8, 0) > 0.8 * len(places)


def test_in_view_undoes_in_photo():
    box = boxes(top=5, left=9, height=40, width=70, flip=1)[0]
    points = np.array([(3.0, 4.0), (60.0, 11.0)])
    assert np.allclose(in_view(box, in_photo(box, points, 64), 64), points)


def test_right_within_a_patch_and_by_chance():
    found, true = np.array([0, 5, 10, 4]), np.array([0, 0, 0, 3])  # in 4 x 4 patches
    assert count_right(found, true, 4, 0) == 1
    assert count_right(found, true, 4, 1) == 2, "4 is a row below 3, at the other end"
    assert chance(true, 4, 0) == 4 / 16
    assert chance(np.array([0, 5]), 4, 1) == (4 + 9) / 16


def test_the_command_writes_accuracy_above_chance(checkpoint, folders, tmp_path, capsys):
    path = tmp_path / "scores.json"
    given = ("correspondence", "--checkpoint", checkpoint, "--data", folders[0], "--json", path)
    assert ibeton([*map(str, given), "--device", "cpu", "--image-size", "64"]) == 0
    report = json.loads(path.read_text())
    scores = report["scores"]["teacher"]["correspondence"]
    assert report["image_size"] == 64
    assert scores["chance"] == pytest.approx(100 / 64)
    assert scores["accuracy"] > 2 * scores["chance"]
    assert scores["accuracy_1"] > scores["accuracy"]
    assert "correspondence accuracy" in capsys.readouterr().out


def test_bad_input_is_one_sentence_and_status_2(checkpoint, folders, tmp_path, capsys):
    def refused(says: str, *also: object) -> None:
        given = ("correspondence", "--checkpoint", checkpoint, "--data", folders[0], *also)
        with pytest.raises(SystemExit) as stopped:
            ibeton(list(map(str, given)))
        assert stopped.value.code == 2
        said = capsys.readouterr().err.strip()
        assert says in said
        assert len(said.splitlines()) == 1

    refused("not a multiple of the patch size", "--image-size", 33)
    refused("nowhere does not exist", "--data", tmp_path / "nowhere")
    refused("holds no photos", "--data", tmp_path)
    refused("missing.pt does not exist", "--checkpoint", tmp_path / "missing.pt")


def test_an_unreadable_photo_is_left_out(checkpoint, folders, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    Image.open(next(Path(folders[0]).rglob("*.jpg"))).save(tmp_path / "whole.jpg")
    given = ("correspondence", "--checkpoint", checkpoint, "--data", tmp_path, "--device", "cpu")
    assert ibeton([*map(str, given), "--json", str(tmp_path / "scores.json")]) == 0
    assert "left out: broken.jpg" in capsys.readouterr().err
