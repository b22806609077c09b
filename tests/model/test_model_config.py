"""Every bad setting is refused by name."""

import dataclasses

import pytest

from ibeton.model import ModelConfig, build
from ibeton.model.config import ARCHITECTURES

BAD = [
    ({"arch": "vit_xl"}, "--arch vit_xl: expected one of vit_t, vit_s, vit_b, vit_l"),
    ({"norm_in_head": "gn"}, "--norm-in-head gn: expected one of none, ln, bn"),
    ({"act": "swish"}, "--act swish: expected one of gelu, relu"),
    ({"patch_size": 15}, "--image-size 224 is not a multiple of --patch-size 15"),
    ({"patch_size": 0}, "--patch-size 0 must be at least 1"),
    ({"image_size": 8}, "--image-size 8 is not a multiple of --patch-size 16"),
    ({"num_heads": 5}, "--embed-dim 384 is not a multiple of --num-heads 5"),
    ({"drop_path": 1.0}, r"--drop-path 1.0 must be in \[0, 1\)"),
    ({"teacher_temp": 0.0}, "--teacher-temp 0.0 must be above 0"),
    ({"center_momentum2": 1.5}, "--center-momentum2 1.5 must be in"),
    ({"epochs": 20}, "--warmup-teacher-temp-epochs 30 .* does not fit in --epochs 20"),
    ({"pred_start_epoch": 780}, "after --pred-start-epoch 780 does not fit in --epochs 800"),
    ({"shared_head_teacher": False}, "share the teacher's head too"),
    ({"global_crops_number": 1, "local_crops_number": 0}, "give at least two views"),
    ({"out_dim": 1}, "--out-dim 1 must be at least 2"),
    ({"head_layers": 0}, "--head-layers 0 must be at least 1"),
    (
        {"arch": "swin_t7", "patch_size": 32, "recompute": "on"},
        "--recompute is for ViTs",
    ),
    ({"layer_scale": -0.1}, "--layer-scale -0.1 must be at least 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(ModelConfig(**options))


def test_architectures_are_the_published_ones_and_may_be_overridden():
    assert ModelConfig(arch="vit_l").backbone_shape() == (1024, 24, 16)
    assert ModelConfig(arch="vit_b", depth=2).backbone_shape() == (768, 2, 12)
    for arch in ARCHITECTURES:
        ModelConfig(arch=arch).check()


def test_patches_have_their_own_prototypes_only_if_no_head_is_shared():
    unshared = {"shared_head": False, "patch_out_dim": 48}
    assert ModelConfig(**unshared, shared_head_teacher=False).patch_prototypes() == 48
    assert ModelConfig(**unshared).patch_prototypes() == 8192


def test_every_option_explains_itself():
    assert all(field.metadata["help"] for field in dataclasses.fields(ModelConfig))
