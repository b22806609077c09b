"""The drawn photos: reproducible, varied, and told apart by shape, not by color."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ibeton.benchmarks.synthetic.photos import (
    CLASSES,
    SyntheticOptions,
    main,
    make_photo,
    make_photos,
)

SMALL = SyntheticOptions(images_per_class=12, val_per_class=4)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    make_photos(folder, SMALL)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.jpg"))}


def test_every_class_is_in_both_splits_and_no_photo_comes_twice(drawn: Path) -> None:
    for split, count in (("train", 12), ("val", 4)):
        found = {folder.name: len(list(folder.iterdir())) for folder in (drawn / split).iterdir()}
        assert found == dict.fromkeys(CLASSES, count)
    assert len(set(files(drawn).values())) == len(CLASSES) * 16


@pytest.mark.slow
def test_a_seed_draws_the_same_files_and_another_seed_others(drawn: Path, tmp_path: Path) -> None:
    make_photos(tmp_path / "same", SMALL)
    assert files(tmp_path / "same") == files(drawn)
    make_photos(tmp_path / "other", SyntheticOptions(images_per_class=12, val_per_class=4, seed=1))
    assert not set(files(tmp_path / "other").values()) & set(files(drawn).values())


def test_photos_are_jpegs_of_many_sizes(drawn: Path) -> None:
    sizes = set()
    for path in drawn.rglob("*.jpg"):
        with Image.open(path) as photo:
            assert (photo.format, photo.mode) == ("JPEG", "RGB")
            sizes.add(photo.size)
    assert len(sizes) > 100
    assert min(map(min, sizes)) >= 80
    assert max(map(max, sizes)) <= 240


def mean_colors(split: str, count: int) -> np.ndarray:
    """Mean color [class, photo, 3] of new photos."""
    photos = [[make_photo(3, split, kind, n) for n in range(count)] for kind in CLASSES]
    return np.array([[np.asarray(photo).mean((0, 1)) for photo in row] for row in photos])


@pytest.mark.slow
def test_color_does_not_give_the_class_away() -> None:
    train, val = mean_colors("train", 25), mean_colors("val", 15)
    centers = train.mean(1)  # [class, 3]
    nearest = np.linalg.norm(val[:, :, None] - centers, axis=-1).argmin(-1)
    right = (nearest == np.arange(len(CLASSES))[:, None]).mean()
    # Chance is 10 %, and 150 guesses scatter by 2.4 points about it.
    assert right < 0.20


def test_all_photos_are_equally_bright() -> None:
    for number, kind in enumerate(CLASSES):
        luma = np.asarray(make_photo(0, "val", kind, number)) @ (0.299, 0.587, 0.114)
        assert 120 < luma.mean() < 136
        assert 40 < luma.std() < 56


def test_the_contact_sheet_shows_all_classes(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    given = ["--images-per-class", "2", "--val-per-class", "1", "--contact-sheet", str(sheet)]
    assert main([str(tmp_path / "drawn"), *given]) == 0
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[0] > 100 * len(CLASSES)
    rows = np.array_split(pixels, len(CLASSES))
    assert all(row.std() > 20 for row in rows), "a row of the sheet is blank"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["{drawn}"], "train exists"),
        (["{tmp}/new", "--images-per-class", "0"], "--images-per-class 0"),
        (["{tmp}/new", "--contact-sheet", "{tmp}/none/sheet.png"], "none does not exist"),
        (["{tmp}/new", "--contact-sheet", "{tmp}/sheet.jpg"], "sheet.jpg"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    arguments: list[str],
    names: str,
    drawn: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = files(drawn)
    assert main([part.format(drawn=drawn, tmp=tmp_path) for part in arguments]) == 2
    error = capsys.readouterr().err
    assert names in error
    assert len(error.splitlines()) == 1
    assert files(drawn) == before
    assert not list(tmp_path.iterdir())
