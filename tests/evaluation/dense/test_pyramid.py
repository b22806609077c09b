import pytest
import torch
from photo_folders import small_vit
from torch import nn

from ibeton.evaluation.dense.pyramid import Pyramid
from ibeton.model.backbones.swin import SwinTransformer
from ibeton.model.config import ModelConfig


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_a_vit_of_any_patch_gives_strides_4_to_32_of_oblong_images(patch):
    pyramid = Pyramid(small_vit(patch_size=patch, image_size=64, depth=4)).eval()
    maps = pyramid(torch.randn(2, 3, 64, 96))
    assert [list(m.shape) for m in maps] == [[2, 32, 64 // s, 96 // s] for s in (4, 8, 16, 32)]


def test_a_swin_gives_the_outputs_of_its_stages():
    config = ModelConfig(arch="swin_t7", embed_dim=192, patch_size=32, image_size=64)
    swin = SwinTransformer(config, is_student=False)
    pyramid = Pyramid(swin).eval()
    images = torch.randn(1, 3, 64, 96)
    maps = pyramid(images)
    shapes = [[1, 24 * 2**i, 16 // 2**i, 24 // 2**i] for i in range(4)]
    assert [list(m.shape) for m in maps] == shapes
    assert torch.allclose(maps[3].flatten(2).transpose(1, 2), swin(images)[:, 1:], atol=1e-6)


def test_maps_are_the_published_blocks_after_the_final_norm():
    vit = small_vit(depth=12)
    pyramid = Pyramid(vit, resized=False).eval()
    images = torch.randn(2, 3, 32, 64)
    outputs = vit.get_intermediate_layers(images, 12)
    for found, block in zip(pyramid(images), (3, 5, 7, 11), strict=True):
        expected = outputs[block][:, 1:].transpose(1, 2).unflatten(2, (4, 8))
        assert torch.allclose(found, expected, atol=1e-6)


def test_without_norm_the_blocks_come_as_they_are():
    vit = small_vit(depth=4)
    images = torch.randn(1, 3, 32, 32)
    bare = Pyramid(vit, norm=False, resized=False).eval()(images)[3]
    normed = vit.norm(bare.flatten(2).transpose(1, 2))
    assert torch.allclose(normed, vit(images)[:, 1:], atol=1e-6)
    assert not vit.norm.weight.requires_grad


def test_norms_of_a_frozen_swin_learn():
    config = ModelConfig(arch="swin_t7", embed_dim=192, patch_size=32, image_size=64)
    pyramid = Pyramid(SwinTransformer(config, is_student=False), frozen=True).train()
    sum(m.square().mean() for m in pyramid(torch.randn(1, 3, 64, 64))).backward()
    for name, parameter in pyramid.named_parameters():
        assert (parameter.grad is not None) == name.startswith("levels."), name


def test_every_parameter_that_trains_receives_a_gradient_and_a_frozen_backbone_none():
    for frozen in (False, True):
        pyramid = Pyramid(small_vit(patch_size=16, image_size=64, depth=4), frozen=frozen).train()
        sum(m.square().mean() for m in pyramid(torch.randn(2, 3, 64, 64))).backward()
        for name, parameter in pyramid.named_parameters():
            trains = not (frozen and name.startswith("backbone."))
            assert parameter.requires_grad == trains
            assert (parameter.grad is not None) == trains, name
        assert pyramid.backbone.training == (not frozen)


def test_stochastic_depth_acts_in_training_alone():
    pyramid = Pyramid(small_vit(True, depth=4, drop_path=0.9), resized=False)
    images = torch.randn(4, 3, 32, 32)
    torch.manual_seed(0)
    assert not torch.allclose(pyramid.train()(images)[3], pyramid(images)[3])
    assert torch.equal(pyramid.eval()(images)[3], pyramid(images)[3])


def test_a_patch_that_leads_to_no_such_stride_is_refused():
    with pytest.raises(ValueError, match="patches of 14 pixels"):
        Pyramid(small_vit(patch_size=14, image_size=28))


def test_blocks_computed_again_in_the_backward_give_the_same_gradients():
    gradients = []
    for again in (False, True):
        vit = small_vit(depth=4, checkpoint_blocks=again)
        torch.manual_seed(1)
        pyramid = Pyramid(vit).train()
        pyramid(torch.ones(2, 3, 32, 32) * torch.linspace(0, 1, 32))[0].square().mean().backward()
        gradients.append(vit.blocks[0].attn.qkv.weight.grad)
    assert torch.allclose(*gradients, atol=1e-7)


def test_the_module_list_of_levels_resizes_as_published_for_patches_of_16():
    levels = Pyramid(small_vit(patch_size=16, image_size=64)).levels
    kinds = [
        [type(m) for m in (level if isinstance(level, nn.Sequential) else [level])]
        for level in levels
    ]
    up = nn.ConvTranspose2d
    assert kinds == [[up, nn.BatchNorm2d, nn.GELU, up], [up], [nn.Identity], [nn.MaxPool2d]]
