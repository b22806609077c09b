"""The fast step against the same step written the obvious way, values and gradients."""

import pytest
import torch

from ibeton.model import ModelConfig, build, training_step
from ibeton.model.backbones.vit import VisionTransformer
from ibeton.model.optim import build_optimizer
from ibeton.model.reference import (
    forward_reference,
    network_reference,
    update_teacher_reference,
    vit_reference,
)

SMALL = {
    **{"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32},
    **{"hidden_dim": 40, "bottleneck_dim": 12, "out_dim": 50, "patch_out_dim": 50},
    **{"local_crops_number": 3, "epochs": 10, "warmup_teacher_temp_epochs": 2, "drop_path": 0.0},
}
CASES = {
    "plain": {},
    "unshared": {"shared_head": False},
    "both_unshared": {"shared_head": False, "shared_head_teacher": False, "patch_out_dim": 31},
    "layer_norm_in_head": {"norm_in_head": "ln", "act": "relu"},
    "batch_norm_in_head": {"norm_in_head": "bn"},
    "mean_pool": {"mean_pool": True, "layer_scale": 0.1},
    "no_biases": {"qkv_bias": False, "norm_last_layer": True},
    "no_local": {"local_crops_number": 0},
    "three_global": {"global_crops_number": 3, "lambda1": 0.5, "lambda2": 2.0},
    "two_prototypes": {"out_dim": 2},
    "many_prototypes": {"out_dim": 65_536},
    "checkpointed": {"checkpoint_blocks": True},
    "not_recomputed": {"recompute": "off"},
}


def make_model(dtype=torch.float32, **options):
    torch.manual_seed(0)
    ibot = build(ModelConfig(**{**SMALL, **options}))
    with torch.no_grad():  # a teacher unlike its student, centers and a mask token that are not 0
        for parameter in ibot.student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        ibot.loss.center.normal_()
        ibot.loss.center2.normal_()
    return ibot.to(dtype)


def make_batch(ibot, images=3, masked="some", dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    views, local = ibot.loss.global_views, ibot.loss.local_views
    global_crops = torch.randn(views, images, 3, 32, 32, generator=g).to(dtype)
    local_crops = torch.randn(local, images, 3, 16, 16, generator=g).to(dtype) if local else None
    masks = torch.rand(views, images, 4, 4, generator=g) < 0.4
    masks[0, 0] = False
    if masked != "some":
        masks[:] = masked == "all"
    return global_crops, local_crops, masks


def outcome(ibot, batch, fast, autocast=None):
    """Everything that a forward and backward leave behind."""
    forward = ibot if fast else lambda *a: forward_reference(ibot, *a)
    ibot.zero_grad()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        terms, means = forward(*batch, 1)
    terms["loss"].backward()
    gradients = {n: p.grad for n, p in ibot.student.named_parameters() if p.requires_grad}
    return {n: t.detach() for n, t in terms.items()}, means, gradients


def assert_same(ibot, batch, tolerance, autocast=None, exact=None):
    terms, means, gradients = outcome(ibot, batch, True, autocast)
    expected_terms, expected_means, expected_gradients = outcome(ibot, batch, False, autocast)
    for name, term in expected_terms.items():
        torch.testing.assert_close(terms[name], term, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(means, expected_means, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(g.abs().max() for g in expected_gradients.values())
    for name, expected in expected_gradients.items():
        assert gradients[name] is not None, name
        assert gradients[name].isfinite().all()
        error = (gradients[name] - expected).abs().max()
        # Some gradients are zero but for rounding: keys' biases, say. The largest is the measure.
        bound = tolerance * (expected.abs().max() + 1e-2 * largest)
        if error > bound and exact is not None:
            error = (gradients[name] - exact[name]).norm()
            bound = 2 * (expected - exact[name]).norm()
        assert error <= bound, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_setting(case, dtype):
    ibot = make_model(dtype, **CASES[case])
    tolerance = 2e-5 if dtype is torch.float32 else 1e-11
    assert_same(ibot, make_batch(ibot, dtype=dtype), tolerance)


@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("masked", ["none", "all", "some"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_batch(images, masked, dtype):
    if dtype.itemsize == 2:
        ibot = make_model()
        assert_same(ibot, make_batch(ibot, images, masked), 40 * torch.finfo(dtype).eps, dtype)
    else:
        ibot, tolerance = make_model(dtype), 1e-11 if dtype is torch.float64 else 2e-5
        assert_same(ibot, make_batch(ibot, images, masked, dtype), tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [c for c in CASES if c != "batch_norm_in_head"])
def test_half_precision(case, dtype):
    """Both ways round, in other places: they differ by a few roundings of the format, or, against
    float32, the fast one is at most twice as wrong as the plain one."""
    ibot = make_model(**CASES[case])
    batch = make_batch(ibot)
    exact = outcome(ibot, batch, fast=False)[2]
    assert_same(ibot, batch, 40 * torch.finfo(dtype).eps, dtype, exact)


def test_logits_of_all_patches_are_the_reference_s():
    ibot = make_model(torch.float64)
    batch = make_batch(ibot, dtype=torch.float64)
    with torch.no_grad():
        mine, expected = ibot.student(*batch), network_reference(ibot.student, *batch)
    for logits, others in zip(mine, expected, strict=True):
        torch.testing.assert_close(logits, others, rtol=1e-11, atol=1e-11)


def test_a_backbone_that_only_gives_tokens_will_do(monkeypatch):
    """What another backbone has to offer is a call: images and masks to tokens."""
    ibot = make_model(torch.float64)
    batch = make_batch(ibot, dtype=torch.float64)
    expected = outcome(ibot, batch, True)
    views = VisionTransformer.forward_views
    monkeypatch.setattr(
        VisionTransformer, "forward", lambda vit, x, m=None: views(vit, [x], [m])[0]
    )
    for name in ("forward_views", "selected", "tokens_for_product"):
        monkeypatch.delattr(VisionTransformer, name)
    torch.testing.assert_close(outcome(ibot, batch, True), expected, rtol=1e-11, atol=1e-11)


def test_student_with_dropped_samples_has_all_gradients():
    """Stochastic depth that drops everything in a block leaves zero gradients, not none: the
    optimizer then still decays."""
    ibot = make_model(drop_path=0.95)
    batch = make_batch(ibot, images=1)
    for seed in range(5):
        torch.manual_seed(seed)
        _, _, gradients = outcome(ibot, batch, True)
        assert all(g is not None and g.isfinite().all() for g in gradients.values())


def test_stochastic_depth_has_the_mean_of_the_simple_way():
    """Over many draws, the first moment of a block's output, in both ways."""
    torch.manual_seed(0)
    vit = make_model(drop_path=0.5).student.backbone
    x = torch.randn(1, 3, 16, 16)
    draws = 3000
    with torch.no_grad():
        fast = vit(x.expand(draws, -1, -1, -1))
        simple = torch.cat([vit_reference(vit, x.expand(500, -1, -1, -1)) for _ in range(6)])
        spread = simple.std(dim=0)
    error = (fast.mean(dim=0) - simple.mean(dim=0)).abs()
    assert (error <= 5 * spread * (2 / draws) ** 0.5 + 1e-6).all()
    assert (fast.std(dim=0) - spread).abs().max() <= 0.1 * spread.max()


def test_moving_average_one_by_one():
    together, apart = make_model(), make_model()
    together.update_teacher(0.9)
    update_teacher_reference(apart, 0.9)
    for name, tensor in apart.teacher.state_dict().items():
        torch.testing.assert_close(
            together.teacher.state_dict()[name], tensor, rtol=1e-6, atol=1e-7
        )


def train(ibot, steps, images=4):
    """Losses of `steps` steps, each with a batch of its own."""
    optimizer, losses = build_optimizer(ibot.student), []
    for i in range(steps):
        g = torch.Generator().manual_seed(100 + i)
        dtype = ibot.loss.center.dtype
        global_crops = torch.randn(2, images, 3, 32, 32, generator=g).to(dtype)
        local_crops = torch.randn(3, images, 3, 16, 16, generator=g).to(dtype)
        masks = torch.rand(2, images, 4, 4, generator=g) < 0.3
        rates = {"lr": 1e-3 * min(1, i / 10), "weight_decay": 0.1, "momentum": 0.99}
        metrics = training_step(
            ibot, optimizer, None, global_crops, local_crops, masks,
            epoch=i * 10 // steps, freeze_last_layer=1, **rates,
        )  # fmt: skip
        losses.append(metrics["loss"].item())
    return losses


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-8)])
def test_micro_steps_change_nothing(dtype, tolerance):
    """60 steps in 1 and in 4 parts: weights, teacher and centers."""
    whole, parts = make_model(dtype), make_model(dtype, micro_steps=4)
    losses = train(whole, 60), train(parts, 60)
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=0)
    for name, tensor in whole.state_dict().items():
        other = parts.state_dict()[name]
        if name.endswith("qkv.bias") and dtype is torch.float32:
            # Keys' biases have no gradient but rounding, which AdamW makes into steps.
            tensor, other = (torch.cat([t[:24], t[48:]]) for t in (tensor, other))
        error = (other - tensor).norm()
        assert error <= tolerance * tensor.norm(), f"{name}: {error:.3g} of {tensor.norm():.3g}"


def test_parts_that_do_not_divide_a_batch_are_refused():
    with pytest.raises(ValueError, match="--micro-steps 3 does not divide a batch of 4 images"):
        train(make_model(micro_steps=3), 1)
