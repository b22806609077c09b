import json
import re
import shutil

import pytest
import torch
from torchvision import tv_tensors

from ibeton.evaluation.dense.coco import (
    CocoPhotos,
    RandomSizeCrop,
    average_precisions,
    batched,
    published_views,
    results,
    to_photo,
    training_view,
)
from ibeton.evaluation.detect import main


@pytest.fixture
def broken(coco, tmp_path):
    return shutil.copytree(coco, tmp_path / "coco")


def test_truth_fed_as_predictions_scores_100(coco):
    photos, records = CocoPhotos(coco, "val"), []
    for index in range(len(photos)):
        truth = photos.truth(index)
        records += results(photos, index, {**truth, "scores": torch.ones(len(truth["labels"]))})
    scores = average_precisions(photos, records)
    assert scores["box_ap"] == pytest.approx(100)
    assert scores["mask_ap"] == pytest.approx(100)
    wrong = [{**r, "category_id": 5 if r["category_id"] != 5 else 10} for r in records]
    assert average_precisions(photos, wrong)["box_ap"] == 0
    assert average_precisions(photos, [])["mask_ap50"] == 0


def test_boxes_half_as_large_score_by_their_overlap_alone(coco):
    """IoU 0.6 with the truth: right at the thresholds 0.5, 0.55 and 0.6 of ten."""
    photos, records = CocoPhotos(coco, "val"), []
    for index in range(len(photos)):
        truth = photos.truth(index)
        boxes = truth["boxes"].clone()
        boxes[:, 2] = boxes[:, 0] + 0.601 * (boxes[:, 2] - boxes[:, 0])
        found = {**truth, "boxes": boxes, "scores": torch.ones(len(boxes))}
        records += results(photos, index, found)
    scores = average_precisions(photos, records)
    assert scores["box_ap"] == pytest.approx(30)
    assert scores["box_ap50"] == pytest.approx(100)
    assert scores["box_ap75"] == 0
    assert scores["mask_ap"] == pytest.approx(100)


def test_a_mask_is_as_large_as_its_pixels_and_not_as_its_box(coco):
    """A thin mask in a large box where there is nothing: a small mistake, and no small box."""
    photos, records = CocoPhotos(coco, "val"), []
    for index in range(len(photos)):
        truth = photos.truth(index)
        diagonal = torch.zeros_like(truth["masks"][:1])
        diagonal[0, :40, :40] = torch.eye(40)
        found = {
            "boxes": torch.cat([torch.tensor([[0.0, 0, 40, 40]]), truth["boxes"]]),
            "labels": torch.cat([truth["labels"][:1], truth["labels"]]),
            "masks": torch.cat([diagonal, truth["masks"]]),
            "scores": torch.tensor([1.0] + [0.5] * len(truth["labels"])),
        }
        records += results(photos, index, found)
    scores = average_precisions(photos, records)
    assert scores["box_ap_small"] == pytest.approx(100)
    assert scores["mask_ap_small"] < 90


def test_sizes_that_no_object_has_are_no_scores(coco):
    scores = average_precisions(CocoPhotos(coco, "val"), [])
    sizes = {"ap", "ap50", "ap75", "ap_small"}
    assert set(scores) == {f"{kind}_{size}" for kind in ("box", "mask") for size in sizes}


def enclosing(mask):
    rows, columns = mask.nonzero().T
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def test_boxes_stay_around_their_masks_in_every_view(coco):
    photos, crops = CocoPhotos(coco, "train"), 0
    for seed in range(100):
        torch.manual_seed(seed)
        index = seed % len(photos)
        image, truth = training_view(published_views((48, 64, 80), 160), *photos.read(index))
        assert truth["masks"].shape[1:] == image.shape[1:]
        crops += len(truth["boxes"]) < 2
        for box, mask in zip(truth["boxes"], truth["masks"], strict=True):
            if mask.any():
                assert (box - enclosing(mask)).abs().max() <= 4  # two resizes to the nearest
            else:
                assert (box[2:] - box[:2]).min() < 3  # a sliver that such a resize loses
    assert crops  # some lost an object


def test_a_resize_and_a_crop_move_boxes_as_they_should():
    truth = {"boxes": torch.tensor([[8.0, 4, 40, 20]]), "labels": torch.tensor([1])}
    truth["boxes"] = tv_tensors.BoundingBoxes(truth["boxes"], format="XYXY", canvas_size=(40, 80))
    truth["masks"] = tv_tensors.Mask(torch.zeros(1, 40, 80, dtype=torch.uint8))
    image, whole, cut = tv_tensors.Image(torch.zeros(3, 40, 80, dtype=torch.uint8)), 0, 0
    for seed in range(20):
        torch.manual_seed(seed)
        large, moved = training_view(published_views((60,), 200), image, truth)
        if large.shape == (3, 60, 120):
            whole += 1
            assert moved["boxes"][0].tolist() in (
                [12, 6, 60, 30],
                [60, 6, 108, 30],
            )  # as it is, or flipped
        else:
            cut += 1
            assert large.shape[1] == 60 or large.shape[2] in (60, 200)
        assert moved["masks"].shape[1:] == large.shape[1:]
    assert whole
    assert cut
    part, _ = RandomSizeCrop(20, 30)(image, truth)
    assert all(20 <= side <= 30 for side in part.shape[1:])
    assert RandomSizeCrop(90, 100)(image, truth)[0].shape == image.shape


def test_images_of_several_sizes_share_a_batch_of_whole_cells():
    images, sizes = batched([torch.ones(3, 40, 70), torch.ones(3, 64, 33)])
    assert images.shape == (2, 3, 64, 96)
    assert sizes == [(40, 70), (64, 33)]
    assert images[0, :, 40:].abs().sum() == 0
    assert images.sum() == 3 * (40 * 70 + 64 * 33)


def test_detections_return_to_the_photos_own_pixels():
    found = {"boxes": torch.tensor([[10.0, 10, 30, 50]]), "masks": torch.ones(1, 1, 28, 28)}
    back = to_photo(found, (100, 100), (50, 200))
    assert back["boxes"].tolist() == [[20, 5, 60, 25]]
    mask = back["masks"][0]
    assert mask.shape == (50, 200)
    assert mask[6:24, 21:59].all()
    assert not mask[:4].any()


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "object 1 has image_id 0, which is not listed"),
        (lambda c: c.pop("categories"), "object 1 has category_id 10, which is not listed"),
        (lambda c: c.pop("annotations"), "is not in COCO's format: 'annotations' is missing"),
        (lambda c: c["images"][0].pop("height"), "is not in COCO's format: 'height' is missing"),
        (lambda c: c["images"][0].update(width="wide"), "is not in COCO's format: .*wide"),
        (lambda c: c["annotations"][0].update(bbox=None), "is not in COCO's format"),
        (lambda c: c["annotations"][0].pop("area"), "object 1 lacks .*area"),
        (lambda c: c["annotations"][0].update(image_id=77), "object 1 has image_id 77"),
        (lambda c: c["annotations"][1].update(category_id=3), "object 2 has category_id 3"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2]), "object 2 lacks bbox"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3, float("nan")]), "object 2 lacks bbox"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, -3, 4]), "object 2 lacks bbox"),
        (lambda c: c.update(images=[], annotations=[]), "lists no usable photos"),
    ],
)
def test_a_bad_json_is_named_with_its_object_before_anything_is_written(
    broken, checkpoint, tmp_path, capsys, change, message
):
    edit(broken / "annotations/instances_train2017.json", change)
    paths = ("--checkpoint", checkpoint, "--data", broken, "--output-dir", tmp_path / "run")
    assert main([*map(str, paths), "--device", "cpu", "--workers", "0"]) == 2
    said = capsys.readouterr().err.strip()
    assert re.fullmatch(rf"error: .*instances_train2017\.json.*{message}.*", said), said
    assert not (tmp_path / "run").exists()


def test_a_bad_photo_a_wrong_size_and_what_is_no_json_are_named(broken):
    path = broken / "annotations/instances_train2017.json"
    edit(path, lambda c: c["images"][0].update(width=99))
    with pytest.raises(ValueError, match=r"000000000000\.jpg has 64 x 48 .* 99 x 48"):
        CocoPhotos(broken, "train").photo(0)
    (broken / "train2017/000000000001.jpg").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"000000000001\.jpg cannot be read"):
        CocoPhotos(broken, "train").photo(1)
    (broken / "train2017/000000000001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"lists .*000000000001\.jpg, which is missing"):
        CocoPhotos(broken, "train")
    path.write_text("{]")
    with pytest.raises(ValueError, match=r"instances_train2017\.json is not .* format: Expecting"):
        CocoPhotos(broken, "train")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"No such file.*instances_train2017\.json"):
        CocoPhotos(broken, "train")


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ("?", r"bad masks of 000000000000\.jpg"),
        ([], r"bad masks of 000000000000\.jpg"),
        ({"counts": "!!", "size": [48, 64]}, r"bad masks of 000000000000\.jpg"),
        ({"counts": [0, 4], "size": [2, 2]}, r"masks of 000000000000\.jpg differ from it in size"),
    ],
)
def test_a_bad_segmentation_is_named_with_its_photo(broken, segmentation, message):
    path = broken / "annotations/instances_train2017.json"
    edit(path, lambda c: c["annotations"][0].update(segmentation=segmentation))
    with pytest.raises(ValueError, match=rf"instances_train2017\.json: {message}"):
        CocoPhotos(broken, "train").truth(0)


def test_crowds_are_not_learned_from_and_photos_with_nothing_else_are_left_out(broken):
    def crowd(content):
        for one in content["annotations"]:
            one["iscrowd"] = int(one["image_id"] == 0 or one["id"] % 2 == 0)

    edit(broken / "annotations/instances_train2017.json", crowd)
    photos = CocoPhotos(broken, "train", with_objects=True)
    assert len(photos) == 5
    assert len(photos.truth(0)["boxes"]) == 1
    assert len(CocoPhotos(broken, "train").truth(0)["boxes"]) == 0
