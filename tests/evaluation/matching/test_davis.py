"""`ibeton davis` on a small video that this file paints."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ibeton.__main__ import main as ibeton
from ibeton.evaluation.matching.davis import frame_size, one_hot, read_davis, read_mask

FRAMES, HEIGHT, WIDTH = 6, 64, 72
OBJECTS = {1: (220, 40, 40), 2: (40, 40, 220)}
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0]


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    """Two colored squares that move over noise, 8 pixels a frame; and one mask of 0 and 255."""
    root = tmp_path / "DAVIS"
    rng = np.random.default_rng(0)
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("two\none\n")
    for name, objects in (("two", OBJECTS), ("one", {255: OBJECTS[1]})):
        images, masks = (root / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for frame in range(FRAMES):
            pixels = rng.integers(90, 150, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            for row, (number, color) in enumerate(objects.items()):
                square = np.s_[8 + 24 * row : 24 + 24 * row, 8 * frame : 8 * frame + 16]
                pixels[square], mask[square] = color, number
            Image.fromarray(pixels).save(images / f"{frame:05d}.jpg", quality=95)
            image = Image.fromarray(mask)
            if name == "two":
                image.putpalette(PALETTE)
            image.save(masks / f"{frame:05d}.png")
    return root


def call(checkpoint: Path, davis: Path, *also: object) -> list[str]:
    given = ("davis", "--checkpoint", checkpoint, "--data", davis, "--short-side", 64, *also)
    return [str(part) for part in (*given, "--device", "cpu")]


def test_moving_squares_are_followed_better_than_by_the_first_mask(
    checkpoint, davis, tmp_path, capsys
):
    also = ("--json", tmp_path / "scores.json", "--masks", tmp_path / "masks", "--untrained")
    assert ibeton(call(checkpoint, davis, *also)) == 0
    report = json.loads((tmp_path / "scores.json").read_text())
    assert list(report["scores"]) == ["teacher", "untrained"]
    assert report["short_side"] == 64
    scores = report["scores"]["teacher"]["davis"]
    assert scores["jf_mean"] > scores["first_mask_jf_mean"] + 20
    assert scores["jf_mean"] == pytest.approx((scores["j_mean"] + scores["f_mean"]) / 2)
    assert "| teacher |" in capsys.readouterr().out
    mask = Image.open(tmp_path / "masks" / "teacher" / "two" / "00003.png")
    assert mask.mode == "P"
    assert mask.size == (WIDTH, HEIGHT)
    assert set(np.unique(np.array(mask))) <= {0, 1, 2}
    assert set(np.unique(read_mask(tmp_path / "masks/teacher/one/00003.png"))) == {0, 255}


def test_the_first_mask_scores_what_its_overlap_says(checkpoint, davis, tmp_path):
    """Squares of 16 pixels that move by 8: they overlap by half in frame 1, and no more."""
    ibeton(call(checkpoint, davis, "--json", tmp_path / "scores.json"))
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]["teacher"]["davis"]
    overlaps = [8 / 24, 0, 0, 0]  # frames 1 to 4: the first and the last do not count
    assert scores["first_mask_j_mean"] == pytest.approx(100 * np.mean(overlaps))


def test_frames_are_480_by_a_multiple_of_64():
    assert frame_size(480, 854, 480) == (480, 832)
    assert frame_size(1080, 1920, 480) == (480, 832)
    assert frame_size(854, 480, 480) == (832, 480)
    assert frame_size(480, 480, 480) == (480, 448)


def test_object_numbers_become_columns(davis):
    for name, numbers in (("one", [0, 255]), ("two", [0, 1, 2])):
        mask = read_mask(davis / "Annotations" / "480p" / name / "00000.png")
        labels, found = one_hot(mask, (HEIGHT // 8, WIDTH // 8))
        assert found == numbers
        assert labels.shape == (72, len(numbers))
        assert labels.sum(dim=0).tolist() == [
            72 - 4 * (len(numbers) - 1),
            *[4] * (len(numbers) - 1),
        ]


def test_another_layout_is_one_sentence_and_status_2(checkpoint, davis, tmp_path, capsys):
    masks = davis / "Annotations" / "480p"

    def refused(says: str, *also: object) -> None:
        given = call(checkpoint, davis, "--json", tmp_path / "scores.json", *also)
        with pytest.raises(SystemExit) as stopped:
            ibeton(given)
        assert stopped.value.code == 2
        said = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error")]
        assert len(said) == 1
        assert says in said[0]
        assert not (tmp_path / "scores.json").exists()

    refused("val.txt is missing", "--data", tmp_path)
    refused("--short-side 60", "--short-side", 60)
    first = masks / "two" / "00000.png"
    drawn = first.read_bytes()
    blank = Image.open(first).point(lambda number: 0)
    blank.save(first)
    refused("00000.png marks no object")
    first.write_bytes(drawn)
    listing = davis / "ImageSets" / "2017" / "val.txt"
    names = listing.read_bytes()
    listing.write_bytes(b"\xff\xfe")
    refused("val.txt is not a text file")
    listing.write_bytes(names)
    (masks / "two" / "00004.png").unlink()
    refused("sequence two has 6 frames but 5 masks")
    (masks / "two").rename(masks / "other")
    refused("sequence two has 6 frames but 0 masks")
    (davis / "ImageSets" / "2017" / "val.txt").write_text("one\n")
    assert len(read_davis(davis)) == 1
    Image.new("L", (10, 10), 1).save(masks / "one" / "00000.png")
    refused("00000.png is 10 x 10 pixels, its frame 72 x 64")
    Image.new("RGB", (WIDTH, HEIGHT)).save(masks / "one" / "00000.png")
    refused("00000.png is RGB; a mask is a palette or gray PNG")
    (masks / "one" / "00000.png").write_bytes(b"no image")
    refused("00000.png cannot be read")
