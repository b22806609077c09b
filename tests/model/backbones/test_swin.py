"""The Swin backbone against the published one, its names against the inventory, its refusals."""

import json
import re

import numpy as np
import pytest
import torch
from paths import REFERENCE
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from torch import nn

from ibeton.model import ModelConfig, build, training_step
from ibeton.model.backbones.swin import SwinTransformer, attention_mask
from ibeton.model.head import IBOTHead
from ibeton.model.optim import build_optimizer, parameter_groups

INVENTORY = REFERENCE / "checkpoint_inventory.json"


def small_swin(is_student=False, **options):
    """Width 8 in the first of four stages."""
    config = ModelConfig(arch="swin_t7", embed_dim=64, **options)
    return SwinTransformer(config, is_student, (1, 2, 1, 1), (1, 2, 2, 4))


def scalar_of(tokens):
    """S of the reference: outputs weighted by a ramp from -1 to 1."""
    return (tokens.flatten() * torch.linspace(-1, 1, tokens.numel())).sum()


@pytest.fixture(params=[7, 14])
def arrays(reference, request):
    return reference(f"swin_w{request.param}")


def published_swin(arrays, is_student=True):
    arch, width = f"swin_t{int(arrays['window_size'])}", 8 * int(arrays["embed_dim"])
    config = ModelConfig(arch=arch, embed_dim=width, drop_path=0.0)
    return SwinTransformer(
        config, is_student, arrays["depths"].tolist(), arrays["num_heads"].tolist()
    )


@pytest.fixture
def swin(arrays, under):
    model = published_swin(arrays)
    model.load_state_dict(under(arrays, "state/"))
    return model


@pytest.fixture
def images(arrays):
    """side in pixels -> the reference's images of that size."""
    return lambda side: torch.from_numpy(arrays[f"x{side}"])


@pytest.fixture
def masks(arrays):
    return lambda side: torch.from_numpy(arrays[f"mask{side // 32}"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 2e-6)])
@pytest.mark.parametrize("side", [224, 96])
def test_tokens(arrays, swin, images, masks, assert_near, side, dtype, tolerance):
    """In float64 what is left is the reference's own float32 noise."""
    swin, x = swin.to(dtype), images(side).to(dtype)
    assert_near(swin(x), arrays[f"tokens{side}"], tolerance)
    assert_near(swin(x, masks(side)), arrays[f"tokens{side}_masked"], tolerance)


def test_tokens_under_autocast(arrays, swin, images, masks, assert_near):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = swin(images(96), masks(96))
    assert_near(tokens.float(), arrays["tokens96_masked"], 0.03)


def test_class_output_comes_first(arrays, swin, images, assert_near):
    assert_near(swin(images(224))[:, 0], arrays["cls224"])


def test_gradients_through_masked_forward(arrays, swin, images, masks, assert_near):
    scalar_of(swin(images(224), masks(224))).backward()
    gradients = {name: p.grad for name, p in swin.named_parameters()}
    assert list(gradients) == list(arrays["grad_names"])
    for name, norm in zip(arrays["grad_names"], arrays["grad_norm"], strict=True):
        assert_near(gradients[name].norm(), norm, what=name)
    watched = [key for key in arrays if key.startswith("grad/")]
    assert len(watched) == 5
    for key in watched:
        assert_near(gradients[key[len("grad/") :]], arrays[key], what=key)


def test_names_order_and_index_tables(arrays, swin, under):
    published = under(arrays, "state/")
    state = published_swin(arrays, is_student=False).state_dict()
    assert list(swin.state_dict()) == list(published)
    assert list(state) == list(published)[1:]  # a teacher has no masked_embed
    tables = [name for name in state if name.endswith("relative_position_index")]
    assert len(tables) == 8
    for name in tables:
        assert state[name].dtype == torch.int64
        assert torch.equal(state[name], published[name].long()), name


def test_windows_and_shifts_as_built(arrays, swin):
    blocks = [block for stage in swin.layers for block in stage.blocks]
    assert [block.window for block in blocks] == arrays["effective_window"].tolist()
    assert [block.shift for block in blocks] == arrays["effective_shift"].tolist()
    assert all(block.norm1.eps == arrays["layernorm_eps"] for block in blocks)


def test_attention_mask_of_a_padded_map(arrays, swin):
    stage = swin.layers[0]
    mask = attention_mask(torch.zeros(1, 24, 24, 1), stage.window, stage.shift)
    np.testing.assert_array_equal(mask, arrays["attn_mask_H24_block1"])


def test_blocks_on_a_padded_map(arrays, swin, assert_near):
    stage = swin.layers[1]
    x = torch.from_numpy(arrays["block_in"]).unflatten(1, (12, 12))
    still, shifted = stage.blocks
    assert_near(still(x, None).flatten(1, 2), arrays["block_out_noshift"])
    mask = attention_mask(x, stage.window, stage.shift)
    assert_near(shifted(x, mask).flatten(1, 2), arrays["block_out_shift"])


def test_odd_maps_are_padded_before_merging(arrays, swin, assert_near):
    x = torch.from_numpy(arrays["merge_in_odd"]).unflatten(1, (7, 7))
    assert_near(swin.layers[1].downsample(x).flatten(1, 2), arrays["merge_out_odd"])


@pytest.mark.parametrize("n", [1, 2, 4])
def test_intermediate_layers(arrays, swin, images, assert_near, n):
    expected = [arrays[f"intermediate96_n4/{k}"] for k in range(4)][-n:]
    outputs = swin.get_intermediate_layers(images(96), n)
    assert len(outputs) == len(expected)
    for output, tokens in zip(outputs, expected, strict=True):
        assert_near(output, tokens)


@pytest.mark.parametrize("n", [8, 9])
def test_means_of_every_block(arrays, swin, images, assert_near, n):
    outputs = swin.get_intermediate_layers(images(96), n)
    assert len(outputs) == 8
    for k, output in enumerate(outputs):
        assert_near(output[:, 0], arrays[f"intermediate96_n8_avg/{k}"])


def test_features_of_frozen_evaluations(arrays, swin, images, assert_near):
    last = swin.get_intermediate_layers(images(96), 1)[-1]
    patches = last[:, 1:].mean(1)
    four = torch.cat([tokens[:, 0] for tokens in swin.get_intermediate_layers(images(96), 4)], -1)
    assert_near(last[:, 0], arrays["features96_n1_avgpool0"])
    assert_near(torch.cat([last[:, 0], patches], -1), arrays["features96_n1_avgpool2"])
    assert_near(four, arrays["features96_n4_avgpool0"])
    assert_near(torch.cat([four, patches], -1), arrays["features96_n4_avgpool2"])


def test_attention_maps(arrays, swin, images, assert_near):
    maps = [
        block.attn.attention_map(block.windows(before), mask)
        for block, before, mask, _ in swin.trace(images(96))
    ]
    for k, weights in enumerate(maps):
        first = weights[: len(weights) // 2]  # of two images
        assert list(first.shape) == arrays["all_attention96_shapes"][k].tolist()
        assert_near(first.double().pow(2).sum(), arrays["all_attention96_rowsum_of_squares"][k])
    small, large = (swin.get_last_selfattention(images(side)) for side in (96, 224))
    assert_near(small[:1], arrays["last_selfattention96_image0"])
    assert_near(large.mean(1), arrays["last_selfattention224_mean"])


def test_attention_maps_are_those_of_the_forward_pass(swin, images):
    with torch.no_grad():
        for block, before, mask, _ in swin.trace(images(96)):
            windows = block.windows(before)
            weights = block.attn.attention_map(windows, mask)
            values = block.attn.qkv(windows).chunk(3, -1)[2]
            values = values.unflatten(2, (block.attn.num_heads, -1)).transpose(1, 2)
            out = block.attn.proj((weights @ values).transpose(1, 2).flatten(2))
            torch.testing.assert_close(out, block.attn(windows, mask))


def test_masked_pixels_have_no_influence(swin, images, masks):
    hidden = masks(96).repeat_interleave(32, 1).repeat_interleave(32, 2)
    noise = torch.where(hidden[:, None], torch.randn(2, 3, 96, 96), images(96))
    assert torch.equal(swin(noise, masks(96)), swin(images(96), masks(96)))
    assert not torch.equal(swin(noise), swin(images(96)))


def test_tokens_of_an_image_do_not_depend_on_its_batch(swin, images, assert_near):
    together = swin(images(96))
    assert_near(swin(images(96)[1:]), together[1:].detach(), 2e-6)


@pytest.mark.parametrize("size", [(96, 160), (112, 112), (32, 32), (36, 100)])
def test_any_size_of_whole_patches(swin, size):
    rows, columns = (-(-side // 32) for side in size)
    assert swin(torch.zeros(2, 3, *size)).shape == (2, 1 + rows * columns, swin.embed_dim)


def test_timm_agrees_where_windows_tile(arrays, swin, images, assert_near):
    """At 224 pixels timm's own model computes the same, under its own names."""
    timm_swin = TimmSwin(
        embed_dim=swin.embed_dim // 8,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        window_size=int(arrays["window_size"]),
        num_classes=0,
        norm_layer=lambda *args, **options: nn.LayerNorm(*args, eps=1e-6, **options),
    ).eval()
    timm_swin.load_state_dict(
        {
            re.sub(
                r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name
            ): tensor
            for name, tensor in swin.state_dict().items()
            if name != "masked_embed" and not name.endswith("relative_position_index")
        }
    )
    assert_near(timm_swin(images(224)), arrays["cls224"])


# Names, shapes, groups and initial values of the published Swin-T.


@pytest.fixture(scope="module", params=["swin_tiny_w7", "swin_tiny_w14"])
def entry(request):
    return json.loads(INVENTORY.read_text())[request.param]


def swin_t(entry, is_student, device="meta"):
    with torch.device(device):
        arch = f"swin_t{entry['build']['window_size']}"
        config = ModelConfig(arch=arch, out_dim=entry["out_dim"])
        backbone, head = SwinTransformer(config, is_student), IBOTHead(config, is_student)
    return nn.ModuleDict({"backbone": backbone, "head": head})


def shapes(module):
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def test_published_names_shapes_and_groups(entry):
    student, teacher = swin_t(entry, True), swin_t(entry, False)
    names = {f"module.{name}": shape for name, shape in shapes(student).items()}
    assert list(names.items()) == list(entry["student"].items())
    assert list(shapes(teacher).items()) == list(entry["teacher"].items())
    extracted = entry["extracted_backbone_file"]["keys_from_teacher"]
    assert list(shapes(teacher["backbone"])) == extracted
    names = {id(p): f"module.{name}" for name, p in student.named_parameters()}
    groups = [[names[id(p)] for p in g["params"]] for g in parameter_groups(student)]
    assert groups[0] == entry["optimizer_group0_decayed"]
    assert groups[1] == entry["optimizer_group1_not_decayed"]
    assert all(p.requires_grad for p in student.parameters())
    assert entry["frozen"] == []


def test_published_parameter_counts(entry):
    student, teacher = swin_t(entry, True), swin_t(entry, False)
    count = {
        "n_student_backbone": student["backbone"],
        "n_teacher_backbone": teacher["backbone"],
        "n_head": student["head"],
    }
    for name, module in count.items():
        assert sum(p.numel() for p in module.parameters()) == entry[name], name
    assert (student["backbone"].embed_dim, student["backbone"].patch_size) == (768, 32)


def test_fresh_values_are_drawn_as_published(entry):
    torch.manual_seed(0)
    state = swin_t(entry, True, "cpu")["backbone"].state_dict()
    fresh = entry["fresh_init_mean_std_min_max"]
    for name, tensor in state.items():
        if name.endswith("relative_position_index"):
            continue
        mean, std, low, high = fresh[f"module.backbone.{name}"]
        values = tensor.double()
        if "patch_embed" not in name and std > 0:
            # trunc_normal_ now and then gives its bound itself, +-2, also in the inventory: with a
            # standard deviation of 0.02 one such value moves the figures of a whole tensor.
            values = values[values.abs() < 2]
            mean, std = (0.0, 0.02) if max(-low, high) == 2 else (mean, std)
        if std == 0:
            assert (values == mean).all(), name
            continue
        n = values.numel()
        assert abs(values.mean() - mean) < 6 * std * (2 / n) ** 0.5, name
        assert abs(values.std() / std - 1) < 6 / n**0.5, name
        if "patch_embed" in name:  # uniform: extremes hardly wander
            extremes = [values.min(), values.max()]
            np.testing.assert_allclose(extremes, [low, high], rtol=0.05, err_msg=name)
        else:  # normal
            assert values.abs().max() < 8 * std, name


# Stochastic depth, training, refusals.


def test_drop_path_grows_over_all_blocks():
    swin = SwinTransformer(ModelConfig(arch="swin_t7", drop_path=0.1), is_student=True)
    rates = [block.drop_path.drop_prob for stage in swin.layers for block in stage.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.1, 12))


def test_drop_path_drops_whole_branches_of_images():
    torch.manual_seed(0)
    swin = small_swin(is_student=True, drop_path=0.5).train()
    block = swin.layers[3].blocks[0]
    assert block.drop_path.drop_prob == 0.5
    x = torch.randn(1, 7, 7, 64).expand(64, -1, -1, -1)
    outputs = block(x, None).flatten(1)
    equal = (outputs[:, None] - outputs).abs().amax(-1) < 1e-4
    assert len(equal.unique(dim=0)) == 4  # attention and MLP, each in or out
    assert (outputs == x.flatten(1)).all(1).any()
    rested = block.eval()(x, None)
    torch.testing.assert_close(rested, rested[:1].expand_as(rested))


def small_ibot():
    """The whole model around a small Swin: student and teacher, head, loss."""
    torch.manual_seed(0)
    options = {"embed_dim": 64, "depth": 1, "num_heads": 1, "drop_path": 0.0, "out_dim": 48}
    sizes = {"hidden_dim": 32, "bottleneck_dim": 16, "local_crops_number": 3}
    ibot = build(ModelConfig(**options, **sizes, epochs=10, warmup_teacher_temp_epochs=2))
    ibot.student.backbone = small_swin(is_student=True, image_size=64)
    ibot.teacher.backbone = small_swin(image_size=64).requires_grad_(False)
    with torch.no_grad():  # a fresh masked token is zero, and blows gradients up in every norm
        for parameter in ibot.student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ibot.copy_student_to_teacher()
    return ibot


def small_batch():
    generator = torch.Generator().manual_seed(1)
    global_crops = torch.randn(2, 3, 3, 64, 64, generator=generator)
    local_crops = torch.randn(3, 3, 3, 32, 32, generator=generator)
    masks = torch.rand(2, 3, 2, 2, generator=generator) < 0.4
    masks[0, 0, 0, 0] = True
    return global_crops, local_crops, masks


def test_training_steps():
    ibot = small_ibot()
    started = {name: p.detach().clone() for name, p in ibot.student.backbone.named_parameters()}
    optimizer = build_optimizer(ibot.student)
    rates = {"epoch": 1, "lr": 1e-3, "weight_decay": 0.04, "momentum": 0.5, "freeze_last_layer": 0}
    metrics = [training_step(ibot, optimizer, None, *small_batch(), **rates) for _ in range(2)]
    assert all(m["finite"] and m["patch"] > 0 for m in metrics)
    assert metrics[1]["loss"] < metrics[0]["loss"]
    student = dict(ibot.student.backbone.named_parameters())
    teacher = dict(ibot.teacher.backbone.named_parameters())
    assert set(student) - set(teacher) == {"masked_embed"}
    assert all(not torch.equal(p, started[name]) for name, p in student.items())
    for name, parameter in teacher.items():
        assert parameter.grad is None
        moved = (parameter - started[name]).norm()
        assert 0 < moved < (student[name] - started[name]).norm(), name


def test_checkpointed_blocks_compute_the_same():
    gradients = []
    for checkpoint_blocks in (False, True):
        torch.manual_seed(0)
        options = {"image_size": 64, "drop_path": 0.3, "checkpoint_blocks": checkpoint_blocks}
        swin = small_swin(is_student=True, **options)
        swin(torch.ones(4, 3, 64, 64))[:, 0].square().sum().backward()
        named = swin.named_parameters()  # nothing is masked here
        gradients.append([p.grad for name, p in named if name != "masked_embed"])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_images_that_do_not_fit_are_refused():
    swin = small_swin(is_student=True)
    with pytest.raises(ValueError, match="98 x 96 pixels are not a whole number of 4 pixel patche"):
        swin(torch.zeros(1, 3, 98, 96))
    with pytest.raises(ValueError, match=r"112 x 96 pixels are not .* 32 pixel cells of a mask"):
        swin(torch.zeros(1, 3, 112, 96), torch.zeros(1, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[1, 4, 96, 96\]: expected \[B, 3, H, W\]"):
        swin(torch.zeros(1, 4, 96, 96))


@pytest.mark.parametrize("masks", [torch.zeros(1, 24, 24).bool(), torch.zeros(1, 3, 3)])
def test_wrong_masks_are_refused(masks):
    swin = small_swin(is_student=True)
    with pytest.raises(
        ValueError, match=r"expected bool \[1, 3, 3\], one value per cell of 32 x 32"
    ):
        swin(torch.zeros(1, 3, 96, 96), masks)


def test_masks_for_a_backbone_without_mask_token_are_refused():
    with pytest.raises(ValueError, match="only a student"):
        small_swin()(torch.zeros(1, 3, 96, 96), torch.zeros(1, 3, 3).bool())


def test_widths_that_the_heads_do_not_divide_are_refused():
    config = ModelConfig(arch="swin_t7", embed_dim=80)
    with pytest.raises(ValueError, match=r"widths \[10, 20, 40, 80\] .* \(1, 3, 1, 1\)"):
        SwinTransformer(config, False, (1, 2, 1, 1), (1, 3, 1, 1))


def test_no_layers_asked_for_is_refused():
    with pytest.raises(ValueError, match="n = 0"):
        small_swin().get_intermediate_layers(torch.zeros(1, 3, 32, 32), 0)
