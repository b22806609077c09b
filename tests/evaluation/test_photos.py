"""Views of labeled photos: random ones, and the fingerprint of a set."""

import os

import numpy as np
import pytest
import torch
from photo_folders import COLORS, wait_for_another_time, write_photos
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import (
    center_crop,
    hflip,
    pil_to_tensor,
    resize,
    resized_crop,
)

from ibeton.evaluation.photos import (
    LINEAR_SCALE,
    PhotoSet,
    evaluation_view,
    random_view,
    view_batches,
)
from ibeton.pipeline.convert.converter import ConvertOptions, convert
from ibeton.pipeline.sampling.draws import ViewSpec, draw_views

FLIP = Image.Transpose.FLIP_LEFT_RIGHT


def test_random_views_are_torchvisions_crops_and_flips():
    noise = np.random.default_rng(0).integers(0, 256, (53, 71, 3), dtype=np.uint8)
    photo, flips = Image.fromarray(noise), 0
    spec = ViewSpec(24, LINEAR_SCALE, blur_p=0.0, solarize_p=0.0)
    for index in range(40):
        draw = draw_views([spec], 0, 5, index, 53, 71)[0]
        box = [int(draw[side]) for side in ("top", "left", "height", "width")]
        assert 0.06 < box[2] * box[3] / (53 * 71) <= 1
        expected = resized_crop(photo, *box, [24, 24], InterpolationMode.BILINEAR)
        expected = hflip(expected) if draw["flip"] else expected
        assert torch.equal(random_view(photo, 24, 5, index), pil_to_tensor(expected))
        flips += int(draw["flip"])
    assert 10 < flips < 30


def test_random_views_change_with_the_epoch_and_with_nothing_else(folders):
    photos = PhotoSet(folders[0], 16)

    def views(epoch, **how):
        return torch.cat([b.images for b in view_batches(photos, range(24), epoch=epoch, **how)])

    first = views(0, batch_size=5, threads=1)
    assert torch.equal(first, views(0, batch_size=24, threads=4))
    assert not torch.equal(first, views(1, batch_size=24))


@pytest.mark.parametrize("size", [(48, 36), (36, 48), (37, 296), (200, 25)])
def test_evaluation_views_are_torchvisions_up_to_eight_times_as_long_as_wide(size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    photo = Image.fromarray(noise)
    resized = resize(photo, 256, InterpolationMode.BICUBIC)
    assert torch.equal(evaluation_view(photo, 224), pil_to_tensor(center_crop(resized, 224)))


@pytest.mark.parametrize("size", [(8, 401), (400, 9)])
def test_the_middle_of_a_thin_photo_alone_is_resized(size, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    photo, pixels = Image.fromarray(noise), []
    expected = pil_to_tensor(center_crop(resize(photo, 256, InterpolationMode.BICUBIC), 224))
    whole = Image.Image.resize

    def counted(image, sides, *how):
        pixels.append(sides[0] * sides[1])
        return whole(image, sides, *how)

    monkeypatch.setattr(Image.Image, "resize", counted)
    view = evaluation_view(photo, 224)
    assert max(pixels) <= 9 * 256 * 256
    assert (view.int() - expected.int()).abs().float().mean() < 4


@pytest.mark.parametrize("threads", [1, 3])
def test_views_come_in_the_order_that_was_asked_for(folders, threads):
    photos = PhotoSet(folders[0], 16)
    order = np.random.default_rng(0).permutation(24)
    batches = list(view_batches(photos, order, 7, threads))
    assert np.array_equal(np.concatenate([b.indices for b in batches]), order)
    assert [len(b.images) for b in batches] == [7, 7, 7, 3]
    for batch in batches:
        for image, index in zip(batch.images, batch.indices, strict=True):
            assert torch.equal(image, photos[index][0])


def test_a_consumer_that_leaves_early_ends_the_threads(folders):
    import threading

    batches = view_batches(PhotoSet(folders[0], 16), range(24), 2, 2)
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("ibeton-decode")]


def changed(path, action):
    """Whether the fingerprint of a set changes with `action`, which keeps its times."""
    before, stat = PhotoSet(path, 16).fingerprint(), os.stat(path)
    wait_for_another_time(path.parent)
    action()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return PhotoSet(path, 16).fingerprint() != before


def test_the_fingerprint_changes_with_a_byte_of_a_beton_even_if_its_time_is_set_back(
    folders, tmp_path
):
    path = tmp_path / "photos.beton"
    convert(folders[0], path, ConvertOptions(workers=1))
    assert PhotoSet(path, 16).fingerprint() == PhotoSet(path, 32).fingerprint()

    def flip_a_bit():
        with open(path, "r+b") as file:
            file.seek(1 << 23)
            byte = file.read(1)[0]
            file.seek(1 << 23)
            file.write(bytes([byte ^ 1]))

    assert changed(path, flip_a_bit)


def test_the_fingerprint_of_a_folder_changes_with_any_of_its_photos(tmp_path):
    folder = write_photos(tmp_path / "photos", COLORS, 2)
    photo = folder / "green" / "1.jpg"
    assert not changed(folder, lambda: None)
    stat = os.stat(photo)

    def mirror():
        Image.open(photo).transpose(FLIP).save(photo)
        os.utime(photo, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    assert changed(folder, mirror)
    assert changed(folder, lambda: photo.rename(folder / "green" / "2.jpg"))
    assert changed(folder, lambda: (folder / "red" / "0.jpg").unlink())
