"""Training views: those of Pillow and timm, the same for any number of threads and processes."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from ibeton.evaluation.finetune.loader import Loader, TrainingViews, ViewSettings
from ibeton.evaluation.finetune.randaugment import RandAugment
from ibeton.evaluation.finetune.sets import open_labeled
from ibeton.evaluation.frozen.features import MEAN
from ibeton.pipeline.sampling.draws import ViewSpec, draw_views

SPEC = "rand-m9-mstd0.5-inc1"
PLAIN = {"blur_p": 0.0, "solarize_p": 0.0, "jitter_p": 0.0, "gray_p": 0.0}


@pytest.fixture(scope="module")
def photos(folders):
    return open_labeled(*map(str, folders)).train


def views(photos, **settings) -> list[torch.Tensor]:
    loading = {k: settings.pop(k) for k in ("rank", "world_size", "threads") if k in settings}
    batch = settings.pop("batch", 8)
    loader = Loader(photos, ViewSettings(24, **settings), batch, **loading)
    return [(b.images.clone(), b.labels, b.indices) for b in loader.epoch(1)]


def test_a_view_is_pillows_bicubic_crop_with_a_flip(photos):
    spec = ViewSpec(24, (0.08, 1.0), **PLAIN)
    for index in range(6):
        pixels, out = photos.pixels(index), np.empty((1, 3, 24, 24), np.uint8)
        TrainingViews(ViewSettings(24, seed=5)).cut(pixels, index, 2, out)
        draw = draw_views([spec], 5, 2, index, *pixels.shape[:2])[0]
        left, top = int(draw["left"]), int(draw["top"])
        box = (left, top, left + int(draw["width"]), top + int(draw["height"]))
        view = Image.fromarray(pixels).crop(box).resize((24, 24), Image.Resampling.BICUBIC)
        if draw["flip"]:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert np.array_equal(out[0].transpose(1, 2, 0), np.asarray(view))


def test_threads_change_nothing_and_epochs_change_everything(photos):
    one = views(photos, augment=SPEC, threads=1)
    many = views(photos, augment=SPEC, threads=4)
    assert all(
        torch.equal(a, b) for x, y in zip(one, many, strict=True) for a, b in zip(x, y, strict=True)
    )
    loader = Loader(photos, ViewSettings(24, augment=SPEC), 8)
    first, again = next(loader.epoch(1)), next(loader.epoch(2))
    assert torch.equal(first.images, one[0][0])
    assert not torch.equal(first.indices, again.indices)


def test_an_epoch_shows_every_photo_once_with_its_label(photos):
    batches = views(photos)
    indices = torch.cat([b[2] for b in batches])
    assert sorted(indices.tolist()) == list(range(24))
    assert torch.equal(torch.cat([b[1] for b in batches]), torch.from_numpy(photos.labels)[indices])


def test_two_processes_see_what_one_sees(photos):
    whole = views(photos, augment=SPEC)
    halves = [views(photos, augment=SPEC, batch=4, rank=r, world_size=2) for r in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        for i, tensor in enumerate(batch):
            assert torch.equal(tensor, torch.cat([part[i] for part in parts]))


def test_an_epoch_that_is_entered_later_goes_on_the_same(photos):
    loader = Loader(photos, ViewSettings(24, augment=SPEC), 8)
    whole = [b.images.clone() for b in loader.epoch(0)]
    rest = [b.images.clone() for b in loader.epoch(0, first_step=2)]
    assert len(rest) == len(whole) - 2
    assert torch.equal(rest[0], whole[2])


def test_repeats_that_do_not_divide_the_batch_are_cut_off(photos):
    for images, labels, indices in views(photos, repeats=3):
        assert len(images) == len(labels) == len(indices) == 8
        assert indices.unique(return_counts=True)[1].sort().values.tolist() == [2, 3, 3]


def test_repeats_are_different_views_of_one_photo(photos):
    batches = views(photos, repeats=2)
    assert len(batches) == 3
    for images, labels, indices in batches:
        assert torch.equal(indices[::2], indices[1::2])
        assert torch.equal(labels[::2], labels[1::2])
        assert not any(torch.equal(a, b) for a, b in zip(images[::2], images[1::2], strict=True))
    assert len(torch.cat([b[2] for b in batches]).unique()) == 12


def test_a_photo_that_cannot_be_read_is_replaced_with_its_neighbors_label(folders, tmp_path):
    import shutil

    shutil.copytree(folders[0], tmp_path / "train")
    (tmp_path / "train" / "blue" / "7.jpg").write_bytes(b"no photo")
    photos = open_labeled(str(tmp_path / "train"), str(folders[1])).train
    loader = Loader(photos, ViewSettings(24), 24)
    (batch,) = loader.epoch(0)
    assert batch.indices.bincount(minlength=24).tolist() == [1] * 7 + [0, 2] + [1] * 15
    assert torch.equal(batch.labels, torch.from_numpy(photos.labels)[batch.indices])
    assert list(loader.unreadable) == [7]


def test_randaugment_applies_timms_operations_at_timms_rates_and_strengths():
    from timm.data.auto_augment import rand_augment_transform

    ours = RandAugment(SPEC, 224, MEAN)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(6000):
        drawn.append(ours.draw(rng))
    counts = np.bincount([len(one) for one in drawn], minlength=3) / 6000
    assert counts == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    found: dict[str, list[float]] = {}
    for one in drawn:
        for operation, arguments in one:
            found.setdefault(operation.name, []).append(arguments[0] if arguments else 0.0)
    hparams = {"translate_const": 100, "img_mean": (124, 116, 104), "interpolation": 3}
    theirs = rand_augment_transform(SPEC, hparams)
    assert set(found) == {operation.name for operation in theirs.ops}
    random.seed(0)
    for operation in theirs.ops:
        own = np.array(found[operation.name])
        assert len(own) / 6000 == pytest.approx(1 / 15, abs=0.015)
        if operation.level_fn is None:
            continue
        levels = [max(0, min(10, random.gauss(9, 0.5))) for _ in range(4000)]
        expected = np.array([operation.level_fn(level, operation.hparams)[0] for level in levels])
        if operation.name.startswith("Posterize"):
            expected = np.maximum(expected, 1)
        assert own.mean() == pytest.approx(expected.mean(), abs=0.15 * expected.std() + 1e-9)
        assert own.std() == pytest.approx(expected.std(), rel=0.15, abs=0.05)


def test_global_generators_are_left_alone():
    ours, view = RandAugment(SPEC, 24, MEAN), np.zeros((3, 24, 24), np.uint8)
    rng, python = np.random.default_rng(0), random.getstate()
    numpy = np.random.get_state()[1].copy()  # noqa: NPY002
    for _ in range(300):
        ours.apply(view, rng)
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy)  # noqa: NPY002 - timm's own


@pytest.mark.parametrize("spec", ["augmix-m5", "rand-m9-n2-w0-inc1", "nothing"])
def test_another_augmentation_is_refused(spec):
    with pytest.raises(ValueError, match="--augment"):
        RandAugment(spec, 224, MEAN)
