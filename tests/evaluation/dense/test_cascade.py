import pytest
import torch
from photo_folders import small_vit
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, roi_align

from ibeton.evaluation.dense.cascade import STAGES, Cascade, Sampler, best, decode, pool
from ibeton.evaluation.dense.coco import CocoPhotos, published_views, training_view
from ibeton.evaluation.dense.detector import Detector
from ibeton.evaluation.detect import Detection

BOXES = torch.tensor([[8.0, 8, 40, 40], [30, 20, 62, 60]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Detector(small_vit(depth=4), classes=3, width=16)


@pytest.fixture(scope="module")
def batch(coco):
    photos, samples = CocoPhotos(coco, "train"), []
    for index in range(2):
        torch.manual_seed(index)
        samples.append(training_view(published_views((64,), 96), *photos.read(index)))
    return Detection.collate(samples)


def test_all_three_stages_and_the_backbone_receive_gradients(model, batch):
    losses = model.train()(batch)
    names = {f"{part}{i}" for part in ("class", "box", "mask") for i in range(3)}
    assert names | {"loss", "loss_objectness", "loss_rpn_box_reg"} == set(losses)
    assert torch.isclose(losses["loss"], sum(v for k, v in losses.items() if k != "loss"))
    losses["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith("bias"):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    model.zero_grad()


def test_losses_do_not_depend_on_the_global_generator(model, batch):
    model.train()
    torch.manual_seed(1)
    first = model(batch)["loss"]
    torch.manual_seed(2)
    assert torch.isclose(first, model(batch)["loss"])


def test_a_batch_without_an_object_has_finite_losses_and_gradients(model, batch):
    empty = [
        {"boxes": t["boxes"][:0], "labels": t["labels"][:0], "masks": t["masks"][:0]}
        for t in batch["truth"]
    ]
    losses = model.train()({**batch, "truth": empty})
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert all(losses[f"{part}{i}"] == 0 for part in ("box", "mask") for i in range(3))
    assert torch.isfinite(model.pyramid.backbone.patch_embed.proj.weight.grad).all()
    model.zero_grad()


def test_detections_lie_in_the_image_and_above_the_threshold(model, batch):
    model.eval()
    with torch.no_grad():
        found = model.detect(batch["images"], batch["sizes"])
    for one, (height, width) in zip(found, batch["sizes"], strict=True):
        assert len(one["boxes"]) == len(one["labels"]) == len(one["scores"]) == len(one["masks"])
        assert one["masks"].shape[1:] == (28, 28)
        assert (one["boxes"] >= 0).all()
        assert (one["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert (one["scores"] > 0.05).all()
        assert set(one["labels"].tolist()) <= {1, 2, 3}


def test_a_later_stage_asks_for_a_larger_overlap(model, batch):
    cascade, truth = model.cascade, batch["truth"][:1]
    cascade.sampler.draws = [7]
    shifted = truth[0]["boxes"] + torch.tensor([6.0, 0, 6, 0])
    overlap = box_iou(truth[0]["boxes"], shifted).diag()
    for i, stage in enumerate(STAGES):
        ((boxes, labels, objects, given),) = cascade.choose([shifted], truth, i)
        expected = len(shifted) + int((overlap >= stage.iou).sum())
        assert int((labels > 0).sum()) == len(objects) == expected
        assert int(given.sum()) == len(shifted)  # the truth's own boxes are always among them
        assert torch.equal(labels[labels > 0], truth[0]["labels"][objects])
        own = box_iou(boxes[labels > 0], truth[0]["boxes"])[range(len(objects)), objects]
        assert (own >= stage.iou).all()


def test_a_sampler_keeps_the_balance_and_follows_its_draws():
    labels = torch.cat([torch.ones(40), torch.zeros(60), -torch.ones(20)]).long()
    sampler = Sampler(32, 0.25)
    sampler.draws = [5]
    (positive,), (negative,) = sampler([labels])
    assert int(positive.sum()) == 8
    assert int(negative.sum()) == 24
    assert (labels[positive.bool()] == 1).all()
    assert (labels[negative.bool()] == 0).all()
    again = sampler([labels])
    assert torch.equal(again[0][0], positive)
    sampler.draws = [6]
    assert not torch.equal(sampler([labels])[0][0], positive)
    few = Sampler(32, 0.25).choose(labels[38:], 0)
    assert [int(mask.sum()) for mask in few] == [2, 30]


def test_boxes_are_pooled_from_the_level_that_fits_their_size():
    torch.manual_seed(0)
    maps = [torch.randn(2, 5, 256 // stride, 256 // stride) for stride in (4, 8, 16, 32)]
    boxes = [
        torch.tensor([[0.0, 0, 56, 56], [10, 10, 210, 250]]),
        torch.tensor([[3.0, 5, 120, 130]]),
    ]
    found = pool(maps, boxes, 7)
    rois = torch.tensor([[0, 0, 0, 56, 56], [0, 10, 10, 210, 250], [1, 3, 5, 120, 130]]).float()
    for i, level in enumerate((0, 1, 1)):  # sides 56, 219 and 121: 56 * 2 ** level at least
        stride = (4, 8, 16, 32)[level]
        expected = roi_align(maps[level], rois[i : i + 1], 7, 1 / stride, 0, aligned=True)
        assert torch.allclose(found[i], expected[0], atol=1e-6)


def test_deltas_that_torchvision_encodes_lead_back_to_the_box():
    proposals = BOXES + torch.tensor([3.0, -2, 1, 4])
    for stage in STAGES:
        coder = BoxCoder((1 / stage.center_std,) * 2 + (1 / stage.size_std,) * 2)
        deltas = coder.encode_single(BOXES, proposals)
        assert torch.allclose(decode(deltas, proposals, stage), BOXES, atol=1e-4)


def test_of_boxes_that_overlap_the_best_of_a_class_is_left():
    boxes = BOXES[[0, 0, 1]][:, None].expand(3, 2, 4) + torch.tensor([[[0.0]], [[1.0]], [[0.0]]])
    scores = torch.tensor([[0.9, 0.01], [0.8, 0.3], [0.02, 0.7]])
    found = best(boxes, scores, (100, 100))
    assert found["scores"].tolist() == pytest.approx([0.9, 0.7, 0.3])
    assert found["labels"].tolist() == [1, 2, 2]


def test_heads_are_as_published():
    cascade = Cascade(256, 80)
    parameters = sum(p.numel() for p in cascade.boxes[0].parameters())
    convs = 4 * (256 * 256 * 9 + 2 * 256)
    assert parameters == convs + (256 * 49 + 1) * 1024 + 1025 * 81 + 1025 * 81 * 4
    assert len(cascade.masks) == 3
    assert cascade.masks[0][1].mask_fcn_logits.out_channels == 81
