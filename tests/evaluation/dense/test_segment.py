import json
import shutil

import numpy as np
import pytest
import torch
from photo_folders import small_vit
from PIL import Image

from ibeton.evaluation.dense import segmenter, trainer
from ibeton.evaluation.dense.photos import palette
from ibeton.evaluation.dense.segmentation_data import IGNORED
from ibeton.evaluation.dense.segmenter import Dropout, Segmenter, pixel_loss, starts
from ibeton.evaluation.dense.task import Place
from ibeton.evaluation.segment import Segmentation, SegmentConfig, main
from ibeton.model.checkpoint import load_backbone, load_checkpoint

SMALL = "--batch-size 4 --crop-size 32 --short-side 32 --warmup-steps 2 --workers 0 --device cpu"


def segment(checkpoint, scenes, folder, *options):
    arguments = [
        "--checkpoint",
        str(checkpoint),
        "--data",
        str(scenes),
        "--output-dir",
        str(folder),
    ]
    return main([*arguments, *SMALL.split(), *options])


def losses(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


LINEAR = ("--head", "linear", "--lr", "0.01", "--steps", "30", "--log-steps", "1")


@pytest.fixture(scope="module")
def unbroken(checkpoint, scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    assert segment(checkpoint, scenes, folder, *LINEAR, "--pictures", "2") == 0
    return folder


def test_a_linear_head_learns_and_leaves_the_backbone_as_it_was(unbroken, checkpoint):
    scores = json.loads((unbroken / "scores.json").read_text())["scores"]
    assert scores["miou"] > 1.5 * scores["majority_miou"]
    by_step = losses(unbroken)
    assert sum(by_step[i] for i in range(25, 30)) < 0.8 * sum(by_step[i] for i in range(5))
    before, after = load_backbone(checkpoint)[0], load_backbone(unbroken / "checkpoint.pt")[0]
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name


def test_pictures_and_label_maps_show_what_is_predicted(unbroken, scenes):
    maps = sorted((unbroken / "predictions").glob("*.png"))
    assert len(maps) == 2
    for path in maps:
        name, said = path.stem, np.array(Image.open(path))
        truth = np.array(Image.open(scenes / f"annotations/val/{name}.png"))
        assert said.shape == truth.shape
        assert set(np.unique(said)) <= {1, 2, 3, 4}  # as the data set counts its classes
        assert (said == truth)[truth > 0].mean() > 0.5
        picture = np.array(Image.open(unbroken / "pictures" / path.name).convert("RGB"))
        assert picture.shape[1] > 1.5 * picture.shape[0]  # three side by side
        colors = palette(4)
        for label in np.unique(truth[truth > 0]):
            assert (picture == colors[label - 1]).all(axis=2).any(), label


def test_a_stopped_run_resumes_to_the_same_weights(unbroken, checkpoint, scenes, tmp_path, capsys):
    folder = tmp_path / "run"
    assert segment(checkpoint, scenes, folder, *LINEAR, "--max-hours", "1e-9") == 85
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == 1
    assert segment(checkpoint, scenes, folder, *LINEAR) == 2
    assert "already holds a run" in capsys.readouterr().err
    again = ("--resume", "auto")
    assert segment(checkpoint, scenes, folder, *LINEAR, *again, "--lr", "0.02") == 2
    assert "--lr 0.01 is now 0.02" in capsys.readouterr().err
    assert segment(checkpoint, scenes, folder, *LINEAR, *again) == 0
    assert losses(folder) == losses(unbroken)
    ended, expected = (load_checkpoint(f / "checkpoint.pt")["model"] for f in (folder, unbroken))
    assert all(torch.equal(ended[name], tensor) for name, tensor in expected.items())


def test_a_loss_that_stays_nan_ends_the_run_under_loss_scaling_too(
    checkpoint, scenes, tmp_path, capsys, monkeypatch
):
    """One such step is skipped; the scale does not hide a streak of them."""
    monkeypatch.setattr(trainer, "precision_on", lambda device, name: ("fp16", None))
    options = ("--head", "linear", "--lr", "0.01", "--steps", "12", "--log-steps", "1")
    calls = []

    def lost(steps):
        def loss(*arguments):
            calls.append(1)
            return pixel_loss(*arguments) * (torch.nan if len(calls) in steps else 1)

        return loss

    monkeypatch.setattr(segmenter, "pixel_loss", lost([3]))
    assert segment(checkpoint, scenes, tmp_path / "once", *options) == 0
    calls.clear()
    monkeypatch.setattr(segmenter, "pixel_loss", lost(range(3, 99)))
    assert segment(checkpoint, scenes, tmp_path / "always", *options) == 1
    assert len(losses(tmp_path / "always")) < 8
    assert "the loss is nan at step" in capsys.readouterr().err


def test_logits_that_are_no_numbers_are_refused(checkpoint, scenes, tmp_path):
    paths = {"checkpoint": str(checkpoint), "data": str(scenes), "output_dir": str(tmp_path)}
    task = Segmentation(SegmentConfig(**paths, head="linear", crop_size=64, short_side=64))
    task.model.pyramid.backbone.norm.weight.data[0] = torch.nan
    task.model.eval()
    with torch.inference_mode(), pytest.raises(ValueError, match="NaN or infinity"):
        task.evaluate(Place(torch.device("cpu"), 0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--crop-size", "40"), "--crop-size 40 is not a multiple of 32"),
        (("--precision", "fp16"), "--precision fp16 needs a GPU"),
        (("--checkpoint", "none.pt"), "none.pt does not exist"),
        (("--data", "nowhere"), "nowhere"),
        (("--batch-size", "1", "--head", "upernet"), "--batch-size 1"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_folder(
    checkpoint, scenes, tmp_path, capsys, options, message
):
    with_status = []
    try:
        with_status.append(
            segment(checkpoint, scenes, tmp_path / "run", "--head", "linear", *options)
        )
    except SystemExit as error:
        with_status.append(error.code)
    said = capsys.readouterr().err.strip()
    assert with_status == [2]
    assert said.startswith("error: ")
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


def test_a_bad_label_map_ends_the_run_with_one_sentence(checkpoint, scenes, tmp_path, capsys):
    broken = shutil.copytree(scenes, tmp_path / "scenes")
    path = broken / "annotations/train/3.png"
    Image.fromarray(np.array(Image.open(path)) + 9).save(path)
    assert segment(checkpoint, broken, tmp_path / "run", *LINEAR) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {path} holds label ")


def test_windows_cover_a_side_and_end_flush():
    assert starts(512, 512, 341) == [0]
    assert starts(683, 512, 341) == [0, 171]
    assert starts(1365, 512, 341) == [0, 341, 682, 853]


def test_one_window_is_the_prediction_itself_and_several_are_averaged():
    model = Segmenter(small_vit(depth=4, patch_size=16, image_size=32), 3, "linear").eval()
    image = torch.randn(3, 32, 48)
    one = model.slide(image[..., :32], 32, 16)
    assert torch.allclose(one, model.predict(image[None, ..., :32])[0], atol=1e-6)
    left, right = (model.predict(image[None, ..., at : at + 32])[0] for at in (0, 16))
    expected = torch.zeros(3, 32, 48)
    expected[..., :32] += left
    expected[..., 16:] += right
    expected[..., 16:32] /= 2
    assert torch.allclose(model.slide(image, 32, 16), expected, atol=1e-6)
    small = model.slide(image[:, :20, :24], 32, 16)
    assert small.shape == (3, 20, 24)


def test_dropout_draws_for_each_image_from_its_own_seed():
    def dropped(*seeds):
        layer = Dropout().train()
        layer.draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        return layer(torch.ones(len(seeds), 400, 1, 1))

    both = dropped(1, 2)
    assert torch.equal(both[1:], dropped(2))
    assert not torch.equal(both[0], both[1])
    assert both.unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert both.mean() == pytest.approx(1, abs=0.1)
    assert torch.equal(Dropout().eval()(both), both)


def test_unlabeled_pixels_count_as_no_loss_in_a_mean_over_all():
    logits, labels = torch.randn(1, 4, 8, 8), torch.full((1, 8, 8), IGNORED)
    labels[0, 0, 0] = 2
    expected = -logits[0, :, 0, 0].log_softmax(0)[2] / 64
    assert torch.allclose(pixel_loss(logits, labels), expected)
