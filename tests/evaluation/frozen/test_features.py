"""Features: which tokens, in which order, and independent of how they were computed."""

import logging

import pytest
import torch
from photo_folders import COLORS, small_vit, write_photos
from PIL import Image
from torchvision import transforms

from ibeton.evaluation.frozen.features import (
    MEAN,
    NAMES,
    PARTS,
    STD,
    Extraction,
    extract,
    most_attended,
    tokens_of,
)
from ibeton.evaluation.frozen.knn import RawPixels
from ibeton.evaluation.photos import PhotoSet
from ibeton.model import ModelConfig
from ibeton.model.backbones.swin import SwinTransformer
from ibeton.model.head import IBOTHead


def class_tokens(backbone, photos, **how) -> tuple[torch.Tensor, torch.Tensor]:
    found = extract(backbone, photos, ("cls",), Extraction(**how))
    return found["cls"], found.labels


IMAGES = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(2))


def small_head() -> IBOTHead:
    torch.manual_seed(3)
    config = ModelConfig(embed_dim=32, out_dim=16, hidden_dim=24, bottleneck_dim=8)
    return IBOTHead(config, is_student=False).eval()


def test_views_are_torchvisions_resize_and_centre_crop(folders):
    for size, shorter_side in ((32, 37), (224, 256)):
        photos = PhotoSet(folders[0], size)
        files = sorted(folders[0].rglob("*.jpg"))
        expected = transforms.Compose(
            [
                transforms.Resize(shorter_side, interpolation=3),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )
        views = torch.stack([expected(Image.open(file)) for file in files])
        features, labels = class_tokens(RawPixels(), photos, batch_size=5)
        assert torch.allclose(features, views.flatten(1), atol=1e-5, rtol=0)
        assert labels.tolist() == [sorted(COLORS).index(file.parent.name) for file in files]


def test_features_are_the_class_tokens_and_the_backbone_is_left_as_it_was(folders):
    backbone, photos = small_vit().train(), PhotoSet(folders[1], 32)
    backbone.blocks[1].eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    features, _ = class_tokens(backbone, photos, batch_size=4)
    assert features.shape == (9, 32)
    assert features.dtype == torch.float32
    assert not features.is_inference()
    assert backbone.training
    assert not backbone.blocks[1].training
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    images = torch.stack([photos[i][0] for i in range(9)]).float() / 255
    images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = backbone.eval()(images)[:, 0]
    assert torch.allclose(features, expected, atol=1e-5)


def test_batch_size_and_worker_processes_do_not_change_the_features(folders):
    backbone, photos = small_vit(), PhotoSet(folders[1], 32)
    alone, labels = class_tokens(backbone, photos, batch_size=1)
    for batch_size, workers in ((9, 0), (4, 1)):
        features, again = class_tokens(backbone, photos, batch_size=batch_size, threads=workers)
        assert torch.allclose(features, alone, atol=1e-5)
        assert torch.equal(labels, again)


@torch.no_grad()
def test_a_vit_gives_every_kind_of_feature_from_one_pass():
    backbone, head, passes = small_vit(depth=5).eval(), small_head(), []
    backbone.patch_embed.register_forward_hook(lambda *call: passes.append(1))
    found = tokens_of(backbone, head, IMAGES, NAMES)
    assert len(passes) == 1
    tokens = backbone(IMAGES)  # [3, 1 + 36, 32]
    torch.testing.assert_close(found["cls"], tokens[:, 0])
    torch.testing.assert_close(found["patches"], tokens[:, 1:])
    torch.testing.assert_close(found["patch_mean"], tokens[:, 1:].mean(1))
    blocks = backbone.get_intermediate_layers(IMAGES, 4)
    torch.testing.assert_close(found["blocks"], torch.cat([b[:, 0] for b in blocks], 1))
    assert found["blocks"].shape == (3, 128)
    assert torch.equal(found["prototype"], head(tokens)[0].argmax(1))
    assert not backbone.blocks[-1].attn._forward_pre_hooks


@torch.no_grad()
def test_parts_are_means_of_the_patches_that_the_class_token_attends_to_most():
    backbone = small_vit().eval()
    for parameter in backbone.parameters():  # or attention would be nearly even
        parameter.add_(0.2 * torch.randn_like(parameter))
    attention = backbone.get_last_selfattention(IMAGES)[:, :, 0, 1:].mean(1)  # [3, 36]
    normed = backbone(IMAGES)[:, 1:]
    found = tokens_of(backbone, None, IMAGES, ("parts",))["parts"]
    backbone.norm = torch.nn.Identity()  # as published: patches before the final norm
    patches = backbone(IMAGES)[:, 1:]
    assert not torch.allclose(patches, normed, atol=0.1)
    for i, k in enumerate((*PARTS, 36)):
        for image in range(3):
            best = attention[image].topk(min(k, 36)).indices
            torch.testing.assert_close(found[image, i], patches[image, best].mean(0))


def test_patches_of_equal_attention_go_by_their_place():
    patches = torch.arange(20.0).view(1, 20, 1)
    means = most_attended(patches, torch.full((1, 20), 0.05)).flatten().tolist()
    assert means == [0, 3, 6.5, *[9.5] * 4]  # k = 1, 7, 14, and all of them


@torch.no_grad()
def test_a_swin_gives_blocks_of_each_stages_width_and_has_no_parts():
    torch.manual_seed(0)
    config = ModelConfig(arch="swin_t7", embed_dim=64, image_size=64)
    swin = SwinTransformer(config, False, (1, 1, 1, 2), (1, 1, 2, 2)).eval()
    images = torch.randn(2, 3, 64, 64)
    found = tokens_of(swin, None, images, ("cls", "blocks", "patch_mean", "patches"))
    assert found["blocks"].shape == (2, 64 + 64 + 32 + 16)
    assert torch.equal(found["blocks"][:, -64:], found["cls"])
    torch.testing.assert_close(found["cls"], found["patch_mean"])
    torch.testing.assert_close(swin(images)[:, 1:], found["patches"])
    with pytest.raises(ValueError, match="a ViT, not a Swin"):
        tokens_of(swin, None, images, ("parts",))


@torch.no_grad()
def test_the_class_feature_of_mean_pooling_is_what_the_network_calls_its_class_output():
    backbone = small_vit(mean_pool=True).eval()
    found = tokens_of(backbone, None, IMAGES, ("cls", "blocks"))
    torch.testing.assert_close(found["cls"], backbone(IMAGES)[:, 0])
    torch.testing.assert_close(found["blocks"][:, -32:], found["cls"])


def test_prototypes_without_a_head_and_unknown_names_are_refused():
    for names in (("prototype",), ("tokens",)):
        with pytest.raises(ValueError, match=f"feature {names[0]}"):
            tokens_of(small_vit(), None, IMAGES, names)


def test_half_precision_gives_nearly_the_same_features(folders):
    backbone, photos = small_vit(), PhotoSet(folders[1], 32)
    exact = extract(backbone, photos, ("cls", "parts"), Extraction())
    half = extract(backbone, photos, ("cls", "parts"), Extraction(precision="bf16"))
    for name in ("cls", "parts"):
        difference = (exact[name] - half[name]).norm() / exact[name].norm()
        assert 0 < difference < 0.02
        assert half[name].dtype == torch.float32


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="--precision fp16 needs a GPU"):
        Extraction(precision="fp16").dtype()
    assert Extraction(precision="auto").dtype() is None


def test_features_that_are_no_numbers_are_refused(folders):
    backbone = small_vit()
    backbone.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        class_tokens(backbone, PhotoSet(folders[1], 32))


def test_an_unreadable_photo_is_named_counted_and_left_out(folders, tmp_path, caplog):
    val = write_photos(tmp_path / "val", COLORS, 2)
    (val / "green" / "0.jpg").write_bytes(b"no photo")
    with caplog.at_level(logging.WARNING):
        features, labels = class_tokens(RawPixels(), PhotoSet(val, 16), batch_size=2)
    assert labels.tolist() == [0, 0, 1, 2, 2]
    assert len(features) == 5
    assert "0.jpg" in caplog.text
    assert "1 of 6 photos" in caplog.text
    for photo in val.rglob("*.jpg"):
        photo.write_bytes(b"no photo")
    with pytest.raises(ValueError, match="none of the 6 photos"):
        class_tokens(RawPixels(), PhotoSet(val, 16))
