import pytest
import torch
from photo_folders import small_vit
from torchvision.ops import box_iou, roi_align

from ibeton.evaluation.dense.cascade import STAGES, Cascade, Sampler, pool
from ibeton.evaluation.dense.coco import CocoPhotos, published_views, training_view
from ibeton.evaluation.dense.detector import Detector
from ibeton.evaluation.detect import Detection

BOXES = torch.tensor([[8.0, 8, 40, 40], [30, 20, 62, 60]])
DRAWS = [11, 22]


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
    losses = model.train()(batch, DRAWS)
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
    first = model(batch, DRAWS)["loss"]
    torch.manual_seed(2)
    assert torch.isclose(first, model(batch, DRAWS)["loss"])
    assert not torch.isclose(first, model(batch, [3, 4])["loss"])


def test_a_batch_without_an_object_has_finite_losses_and_gradients(model, batch):
    images, sizes, truth = batch
    empty = [{name: values[:0] for name, values in own.items()} for own in truth]
    losses = model.train()((images, sizes, empty), DRAWS)
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert all(losses[f"{part}{i}"] == 0 for part in ("box", "mask") for i in range(3))
    assert torch.isfinite(model.pyramid.backbone.patch_embed.proj.weight.grad).all()
    model.zero_grad()


def test_detections_lie_in_the_image_and_above_the_threshold(model, batch):
    model.eval()
    with torch.no_grad():
        found = model.detect(*batch[:2])
    for one, (height, width) in zip(found, batch[1], strict=True):
        assert len(one["boxes"]) == len(one["labels"]) == len(one["scores"]) == len(one["masks"])
        assert one["masks"].shape[1:] == (1, 28, 28)
        assert (one["boxes"] >= 0).all()
        assert (one["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert (one["scores"] > 0.05).all()
        assert set(one["labels"].tolist()) <= {1, 2, 3}


def test_a_later_stage_asks_for_a_larger_overlap(model, batch):
    truth = batch[2][:1]
    shifted = truth[0]["boxes"] + torch.tensor([6.0, 0, 6, 0])
    overlap = box_iou(truth[0]["boxes"], shifted).diag()
    for stage, (iou, *_) in zip(model.cascade.stages, STAGES, strict=True):
        stage.fg_bg_sampler.draws = [7]
        (boxes,), (labels,), (objects,), (given,) = stage.choose([shifted], truth)
        expected = len(shifted) + int((overlap >= iou).sum())
        assert int((labels > 0).sum()) == len(objects) == expected
        assert int(given.sum()) == len(shifted)  # the truth's own boxes are always among them
        assert torch.equal(labels[labels > 0], truth[0]["labels"][objects])
        own = box_iou(boxes[labels > 0], truth[0]["boxes"])[range(len(objects)), objects]
        assert (own >= iou).all()


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
    assert [int(mask.sum()) for (mask,) in sampler([labels[38:]])] == [2, 30]


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
    for stage in Cascade(8, 2).stages:
        deltas = stage.box_coder.encode_single(BOXES, proposals)
        moved = stage.moved(deltas.repeat(1, 3), [proposals[:1], proposals[1:]])
        assert torch.allclose(moved, BOXES[:, None].expand(2, 3, 4), atol=1e-4)


def test_of_boxes_that_overlap_the_best_of_a_class_is_left():
    boxes = BOXES[[0, 0, 1]] + torch.tensor([[0.0], [1.0], [0.0]])
    scores = torch.tensor([[0.07, 0.9, 0.03], [0.15, 0.55, 0.3], [0.28, 0.02, 0.7]])
    stage = Cascade(8, 2).stages[-1]
    found = stage.postprocess_detections(scores.log(), torch.zeros(3, 12), [boxes], [(100, 100)])
    assert found[1][0].tolist() == pytest.approx([0.9, 0.7, 0.3])
    assert found[2][0].tolist() == [1, 2, 2]


def test_heads_are_as_published():
    cascade = Cascade(256, 80)
    stage = cascade.stages[0]
    heads = (stage.box_head, stage.box_predictor)
    parameters = sum(p.numel() for head in heads for p in head.parameters())
    convs = 4 * (256 * 256 * 9 + 2 * 256)
    assert parameters == convs + (256 * 49 + 1) * 1024 + 1025 * 81 + 1025 * 81 * 4
    assert len(cascade.stages) == 3
    assert stage.mask_predictor.mask_fcn_logits.out_channels == 81
