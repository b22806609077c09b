"""Several --data: photos of all of them, in order, as one data set."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibeton.pipeline import Batch, PipelineConfig, build_loader
from ibeton.pipeline.convert import ConvertOptions, convert
from ibeton.pipeline.loaders import LOADERS
from ibeton.pipeline.store.joined import JoinedBeton, open_all
from ibeton.pipeline.store.photos import open_photos

CONFIG = PipelineConfig(
    batch_size=4,
    workers=1,
    local_crops_number=2,
    global_crops_size=32,
    local_crops_size=16,
    patch_size=8,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders a (classes cat, dog) and b (classes cow, dog), and a.beton and b.beton of them."""
    room, rng = tmp_path_factory.mktemp("several"), np.random.default_rng(0)
    found = []
    for name, classes in (("a", ("cat", "dog")), ("b", ("cow", "dog"))):
        for kind in classes:
            (room / name / kind).mkdir(parents=True)
            for number in range(3):
                noise = rng.integers(0, 256, (40, 48, 3), np.uint8)
                Image.fromarray(noise).save(room / name / kind / f"{number}.jpg")
        convert(room / name, room / f"{name}.beton", ConvertOptions())
        found += [str(room / name), str(room / f"{name}.beton")]
    return found


def batches(paths: tuple[str, ...], loader: str) -> list[Batch]:
    opened = build_loader(replace(CONFIG, data=paths, loader=loader))
    try:
        return list(opened.epoch(0))
    finally:
        opened.close()


def test_photos_follow_each_other_and_classes_go_by_name(sources: list[str]) -> None:
    a, a_beton, b, b_beton = sources
    for paths in ((a, b), (a_beton, b_beton), (a, b_beton)):
        joined, parts = open_all(paths), [open_photos(path) for path in paths]
        assert len(joined) == 12
        assert joined.classes == ["cat", "cow", "dog"]
        assert joined.labels.tolist() == [0, 0, 0, 2, 2, 2, 1, 1, 1, 2, 2, 2]
        for index in range(12):
            part, place = parts[index // 6], index % 6
            assert joined.name(index) == part.name(place)
            assert joined.photo_bytes(index) == part.photo_bytes(place)
            assert np.array_equal(joined.pixels(index), part.pixels(place))


@pytest.mark.parametrize("loader", ["ffcv", pytest.param("pil", marks=pytest.mark.slow), "dali"])
def test_every_loader_gives_the_same_views_of_all_sources(sources: list[str], loader: str) -> None:
    if problem := LOADERS[loader].problem():
        pytest.skip(problem)
    a, a_beton, b, b_beton = sources
    found = batches((a_beton, b_beton), loader)
    expected = batches((a, b) if loader == "dali" else (a, b_beton), "pil")
    assert len(found) == 3
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.global_crops, other.global_crops)
        assert torch.equal(one.local_crops, other.local_crops)
    assert {int(i) for batch in found for i in batch.indices} == set(range(12))


def test_labels_without_names_count_only_where_no_source_has_names(
    sources: list[str], tmp_path: Path
) -> None:
    nameless = []
    for path in sources[1::2]:  # without the JSON that holds the names
        nameless.append(str(tmp_path / Path(path).name))
        Path(nameless[-1]).write_bytes(Path(path).read_bytes())
    assert open_all(nameless).labels.tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert open_all([nameless[0], sources[3]]).labels.tolist() == [-1] * 6 + [0, 0, 0, 1, 1, 1]


def test_one_path_opens_as_before_and_bad_ones_are_named(sources: list[str]) -> None:
    assert type(open_all(sources[1])) is type(open_photos(sources[1]))
    assert not isinstance(open_all((sources[1],)), JoinedBeton)
    with pytest.raises(ValueError, match=r"a\.beton is given twice"):
        open_all((sources[1], sources[3], sources[1]))
    other = str(Path(sources[1]).parent / "x" / ".." / Path(sources[1]).name)
    (Path(sources[1]).parent / "x").mkdir()
    with pytest.raises(ValueError, match=r"a\.beton is given twice"):
        open_all((sources[1], other))
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        open_all((sources[0], "/nowhere"))
    with pytest.raises(
        ValueError, match=r"--loader ffcv reads \.beton files only: .*convert \S+/b "
    ):
        build_loader(replace(CONFIG, data=(sources[1], sources[2]), loader="ffcv"))
