"""Twenty-two corner cases of photo files, through every loader, as files and as a .beton."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_photos import EITHER, UNREADABLE
from pillow_parity import SAME_ARITHMETIC

from ibeton.pipeline import Batch, PipelineConfig, build_loader
from ibeton.pipeline.convert.converter import ConvertOptions, convert
from ibeton.pipeline.loaders import LOADERS

Hard = tuple[Path, dict[str, str]]
PROBLEMS = {name: kind.problem() for name, kind in LOADERS.items()}
SMALL = PipelineConfig(
    batch_size=7,
    workers=1,
    local_crops_number=2,
    global_crops_size=32,
    local_crops_size=16,
    patch_size=8,
)


@pytest.fixture(scope="module")
def hard_beton(hard: Hard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hard") / "hard.beton"
    convert(hard[0], path, ConvertOptions(workers=1))
    return path


def epoch_of(path: Path, kind: str) -> tuple[list[Batch], dict[str, str]]:
    """The batches of two epochs, and the names of the photos that could not be read."""
    if PROBLEMS[kind]:
        pytest.skip(PROBLEMS[kind])
    loader = build_loader(replace(SMALL, data=str(path), loader=kind))
    batches = [*loader.epoch(0), *loader.epoch(1)]
    unreadable = {loader.photos.name(i): reason for i, reason in loader.unreadable.items()}
    loader.close()
    return batches, unreadable


def assert_alike(ours: list[Batch], theirs: list[Batch]) -> None:
    """The same samples, replacements, masks and views, byte for byte."""
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        for name in ("indices", "masks", "global_crops", "local_crops"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("kind", ["pil", "dali"])
def test_what_cannot_be_read_of_a_folder_is_named(kind: str, hard: Hard) -> None:
    folder, owed = hard
    _, unreadable = epoch_of(folder, kind)
    must, may = ({n for n, owes in owed.items() if owes == owing} for owing in (UNREADABLE, EITHER))
    assert must <= set(unreadable) <= must | may
    assert all(name in reason for name, reason in unreadable.items())


@pytest.mark.skipif(not SAME_ARITHMETIC, reason="this Pillow computes in another way")
@pytest.mark.parametrize("kind", ["ffcv", "dali"])
def test_the_beton_of_them_gives_the_pil_loaders_batches(hard_beton: Path, kind: str) -> None:
    ours, unreadable = epoch_of(hard_beton, kind)
    theirs, _ = epoch_of(hard_beton, "pil")
    assert_alike(ours, theirs)
    assert not unreadable, "the converter lets through what can be decoded alone"
