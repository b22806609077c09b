"""The backbone against the published one, and its refusals."""

import functools

import numpy as np
import pytest
import torch

from ibeton.model import ModelConfig
from ibeton.model.backbones.blocks import (
    Block,
    Kept,
    among,
    attend,
    draw_kept,
)
from ibeton.model.backbones.vit import VisionTransformer
from ibeton.model.reference import vit_reference


def small_vit(**options):
    """A teacher's backbone, with neither mask token nor stochastic depth."""
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    return VisionTransformer(ModelConfig(**{**sizes, **options}), is_student=False)


def small_block():
    return Block(ModelConfig(embed_dim=32, num_heads=2, layer_scale=0.1))


def scalar_of(tokens):
    """S of the reference: outputs weighted by a ramp from -1 to 1."""
    return (tokens.flatten() * torch.linspace(-1, 1, tokens.numel())).sum()


def load_vit(arrays, under, **options):
    sizes = {name: int(arrays[name]) for name in ("embed_dim", "depth", "num_heads")}
    has_mask_token = "state/masked_embed" in arrays
    config = ModelConfig(**{"drop_path": 0.0, **sizes, **options})
    model = VisionTransformer(config, is_student=has_mask_token)
    model.load_state_dict(under(arrays, "state/"))
    return model


@pytest.fixture
def arrays(reference):
    return reference("vit")


@pytest.fixture
def vit(arrays, under):
    return load_vit(arrays, under)


@pytest.fixture(params=["packed", "reference"])
def run(request, vit):
    """The backbone's ways: (images, masks) -> tokens."""
    return vit if request.param == "packed" else functools.partial(vit_reference, vit)


@pytest.mark.parametrize("size", ["224", "96", "160", "96x160"])
def test_tokens_without_masks(arrays, run, assert_near, size):
    x = torch.from_numpy(arrays[f"x{size}"])
    assert_near(run(x), arrays[f"tokens{size}"])


def test_tokens_of_all_sizes_together(arrays, vit, assert_near):
    sizes = ["224", "96", "160", "96x160"]
    masks = [torch.from_numpy(arrays["mask224"]), torch.from_numpy(arrays["mask96"]), None, None]
    images = [torch.from_numpy(arrays[f"x{size}"]) for size in sizes]
    outputs = vit.forward_views(images, masks)
    names = ["tokens224_masked", "tokens96_masked", "tokens160", "tokens96x160"]
    for tokens, name in zip(outputs, names, strict=True):
        assert_near(tokens, arrays[name])


def test_dropped_samples_are_the_same_for_selected_tokens():
    torch.manual_seed(5)
    block, shapes, x = small_block(), [(6, 5), (8, 2)], torch.randn(46, 32)
    rows = torch.tensor([0, 3, 5, 11, 29, 30, 31, 44, 45, 0])  # one twice, as padding is
    for kept in (drawn(0.5, shapes, draws=2), [None, None]):
        expected = block(x, shapes, *kept)[rows]
        for attention, mlp in (kept, [k and as_factor(k, 46) for k in kept]):
            selected = block(x, shapes, attention, mlp and among(mlp, rows, 46), rows)
            torch.testing.assert_close(selected, expected)


def test_only_selected_patches_are_returned(arrays, vit, assert_near):
    index = torch.tensor([0, 195, 196, 391])
    images = [torch.from_numpy(arrays[f"x{size}"]) for size in ("224", "96")]
    rows = vit.selected(images, [None, None], index)
    cls, small_cls, patches = rows.split([len(images[0]), len(images[1]), len(index)])
    assert_near(cls, arrays["tokens224"][:, 0])
    assert_near(small_cls, arrays["tokens96"][:, 0])
    assert_near(patches, arrays["tokens224"][:, 1:].reshape(-1, 64)[index])
    assert len(vit.selected(images, [None, None], index[:0])) == len(rows) - len(index)


@pytest.mark.parametrize("size", ["224", "96"])
def test_tokens_with_masks(arrays, run, assert_near, size):
    x, masks = torch.from_numpy(arrays[f"x{size}"]), torch.from_numpy(arrays[f"mask{size}"])
    assert_near(run(x, masks), arrays[f"tokens{size}_masked"])


def test_tokens_in_float64(arrays, vit, assert_near):
    tokens = vit.double()(torch.from_numpy(arrays["x96"]).double())
    assert_near(tokens, arrays["tokens96_f64"], 1e-12)


def test_tokens_with_everything_masked(arrays, vit, assert_near):
    x = torch.from_numpy(arrays["x224"][:1])
    everything = torch.ones(1, 14, 14, dtype=torch.bool)
    assert_near(vit(x, everything), arrays["tokens224_fullmask"])


def test_class_token_comes_first(arrays, vit, assert_near):
    assert_near(vit(torch.from_numpy(arrays["x224"]))[:, 0], arrays["cls224"])


@pytest.mark.parametrize("size", ["224", "96"])
def test_gradients_through_masked_forward(arrays, vit, run, assert_near, size):
    x, masks = torch.from_numpy(arrays[f"x{size}"]), torch.from_numpy(arrays[f"mask{size}"])
    scalar_of(run(x, masks)).backward()
    gradients = {name: p.grad for name, p in vit.named_parameters()}
    assert list(gradients) == list(arrays["grad_names"])
    norms = arrays["grad_norm" if size == "224" else "grad96_norm"]
    for name, norm in zip(arrays["grad_names"], norms, strict=True):
        assert_near(gradients[name].norm(), norm, what=name)
    prefix = "grad/" if size == "224" else "grad96/"
    watched = [key for key in arrays if key.startswith(prefix)]
    assert watched
    for key in watched:
        assert_near(gradients[key[len(prefix) :]], arrays[key], what=key)


@pytest.mark.parametrize(
    "size", ["96x96", "128x128", "160x160", "256x256", "384x384", "96x160", "224x192"]
)
def test_position_interpolation(arrays, vit, assert_near, size):
    height, width = map(int, size.split("x"))
    assert_near(vit.position_embedding(height, width), arrays[f"pos_embed_{size}"])


def test_position_table_itself_at_its_own_size(vit):
    assert vit.position_embedding(224, 224) is vit.pos_embed


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_intermediate_layers(arrays, vit, assert_near, n):
    expected = [arrays[f"intermediate96_n4/{k}"] for k in range(3)][-n:]
    outputs = vit.get_intermediate_layers(torch.from_numpy(arrays["x96"]), n)
    assert len(outputs) == len(expected)
    for output, tokens in zip(outputs, expected, strict=True):
        assert_near(output, tokens)


def test_last_attention(arrays, vit, assert_near):
    small = vit.get_last_selfattention(torch.from_numpy(arrays["x96"]))
    large = vit.get_last_selfattention(torch.from_numpy(arrays["x224"]))
    assert_near(small, arrays["last_selfattention96"])
    assert_near(large[:, :, 0], arrays["last_selfattention224_cls"])


def test_layer_scale_and_mean_pooling(reference, under, assert_near):
    arrays = reference("vit_variants")
    vit = load_vit(arrays, under, layer_scale=0.1, mean_pool=True)
    assert list(vit.state_dict()) == list(under(arrays, "state/"))
    tokens = vit(torch.from_numpy(arrays["x96"]))
    assert_near(tokens, arrays["tokens96"])
    assert_near(tokens[:, 0], arrays["cls96"])


def drawn(rate, shapes, device="cpu", draws=1):
    return draw_kept([rate] * draws, shapes, torch.device(device))


def test_gathered_samples_are_dropped_each_by_itself():
    torch.manual_seed(0)
    kept = drawn(0.25, [(5, 3), (4, 2)], draws=4000)
    first = torch.tensor([k.shapes[0][0] for k in kept], dtype=torch.float32)
    second = torch.tensor([k.shapes[1][0] for k in kept], dtype=torch.float32)
    for count, samples in ((first, 5), (second, 4)):  # binomial: not a fixed number kept
        assert abs(count.mean() - 0.75 * samples) < 0.06
        assert abs(count.var() - 0.75 * 0.25 * samples) < 0.1
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.06


def test_a_sample_keeps_all_its_tokens_or_none():
    torch.manual_seed(1)
    for kept in drawn(0.5, [(6, 5), (8, 2)], draws=20):
        places = kept.tokens.tolist()
        images = [p // 5 if p < 30 else 6 + (p - 30) // 2 for p in places]
        assert all(images.count(i) == (5 if i < 6 else 2) for i in set(images))
        assert kept.shapes == [
            (sum(i < 6 for i in set(images)), 5),
            (len({*images} - {*range(6)}), 2),
        ]
        assert places == sorted(places)


def test_a_rate_of_zero_draws_nothing():
    rates = [0.0, 0.5]
    assert [k is None for k in draw_kept(rates, [(3, 2)], torch.device("cpu"))] == [True, False]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.97])
def test_gathering_equals_multiplying_by_zeros(rate):
    """The branch on kept samples alone, against the branch on all and a factor: values and
    gradients, also where nothing is kept."""
    torch.manual_seed(2)
    block, shapes = small_block(), [(3, 5), (4, 2)]
    x = torch.randn(23, 32)
    for _ in range(6):
        results = []
        kept = draw_kept([rate, rate], shapes, torch.device("cpu"))
        for way in (kept, [as_factor(k, len(x)) for k in kept]):
            leaf = x.clone().requires_grad_()
            block.zero_grad(set_to_none=True)
            out = block(leaf, shapes, *way)
            out.square().sum().backward()
            results.append([out, leaf.grad, *(p.grad for p in block.parameters())])
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def as_factor(kept, tokens):
    factor = torch.zeros(tokens, 1)
    factor[kept.tokens] = kept.scale
    return Kept(None, [], kept.scale, factor)


def test_factors_of_a_device_that_keeps_its_shapes():
    torch.manual_seed(3)
    factors = draw_kept([0.0, 0.5], [(40, 3), (60, 2)], torch.device("meta"))
    assert factors[0] is None
    assert factors[1].tokens is None
    assert factors[1].factor.shape == (240, 1)


def test_checkpointed_blocks_give_the_same_gradients(arrays, under):
    gradients = []
    for checkpointed in (False, True):
        vit = load_vit(arrays, under, drop_path=0.4, checkpoint_blocks=checkpointed)
        torch.manual_seed(4)
        x, masks = torch.from_numpy(arrays["x96"]), torch.from_numpy(arrays["mask96"])
        scalar_of(vit(x, masks)).backward()
        gradients.append([p.grad for p in vit.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_drop_path_rests_in_evaluation(arrays, under, assert_near):
    vit = load_vit(arrays, under, drop_path=0.9).eval()
    assert vit.drop_path_rates == pytest.approx([0, 0.45, 0.9])
    assert_near(vit(torch.from_numpy(arrays["x96"])), arrays["tokens96"])


def test_image_that_patches_do_not_tile_is_refused(vit):
    with pytest.raises(ValueError, match="96 x 100 pixels are not a whole number of 16"):
        vit(torch.zeros(1, 3, 96, 100))


def test_wrong_channels_are_refused(vit):
    with pytest.raises(ValueError, match=r"\[1, 4, 96, 96\]: expected \[B, 3, H, W\]"):
        vit(torch.zeros(1, 4, 96, 96))


@pytest.mark.parametrize("masks", [torch.zeros(1, 6, 5).bool(), torch.zeros(1, 6, 6)])
def test_wrong_masks_are_refused(vit, masks):
    with pytest.raises(ValueError, match=r"expected bool \[1, 6, 6\]"):
        vit(torch.zeros(1, 3, 96, 96), masks)


def test_masks_for_a_backbone_without_mask_token_are_refused():
    vit = small_vit()
    with pytest.raises(ValueError, match="only a student"):
        vit(torch.zeros(1, 3, 96, 96), torch.zeros(1, 6, 6, dtype=torch.bool))


def test_no_layers_asked_for_is_refused():
    with pytest.raises(ValueError, match="n = 0"):
        small_vit().get_intermediate_layers(torch.zeros(1, 3, 32, 32), 0)


@pytest.mark.parametrize(("patch", "size"), [(8, 64), (14, 98), (5, 25)])
def test_any_patch_size(patch, size):
    vit = small_vit(patch_size=patch, image_size=size)
    assert vit(torch.zeros(2, 3, size, 2 * size)).shape == (2, 1 + 2 * (size // patch) ** 2, 32)


def test_position_gradient_is_not_lost_in_interpolation(arrays, vit):
    scalar_of(vit(torch.from_numpy(arrays["x96"]))).backward()
    assert np.count_nonzero(vit.pos_embed.grad.abs().sum(-1)) == 197


def test_attention_of_bfloat16_on_a_cpu_is_computed_in_float32() -> None:
    heads = [torch.randn(2, 3, 17, 32).bfloat16().requires_grad_() for _ in range(3)]
    exact = [head.detach().float().requires_grad_() for head in heads]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(*heads)
    expected = torch.nn.functional.scaled_dot_product_attention(*exact)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.bfloat16())
    out.backward(torch.ones_like(out))
    expected.backward(torch.ones_like(expected))
    for head, wide in zip(heads, exact, strict=True):
        assert torch.equal(head.grad, wide.grad.bfloat16())
