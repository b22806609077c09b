"""Each Triton kernel against its reference, values and every gradient. On CUDA where there is a
device, else in Triton's interpreter: `test_interpreted.py` runs this file so."""

import weakref

import pytest
import torch

from ibeton.model import ModelConfig
from ibeton.model.backbones.vit import VisionTransformer
from ibeton.model.fused import block
from ibeton.model.kernels import packed_attention
from ibeton.model.kernels.bias_gelu import (
    bias_gelu,
    bias_gelu_backward,
    bias_gelu_forward,
    bias_gelu_reference,
)
from ibeton.model.kernels.column_sums import column_sums, column_sums_reference
from ibeton.model.kernels.embed_tokens import (
    Added,
    embed_tokens,
    embed_tokens_backward,
    embed_tokens_reference,
)
from ibeton.model.kernels.half_weights import HalfWeights, in_dtype
from ibeton.model.kernels.head.unit_rows import unit_rows, unit_rows_backward, unit_rows_reference
from ibeton.model.kernels.head.weight_norm import (
    weight_norm,
    weight_norm_backward,
    weight_norm_reference,
)
from ibeton.model.kernels.launch import interpreted
from ibeton.model.kernels.library_attention import pack_gradients, pack_gradients_reference
from ibeton.model.kernels.packed_attention import (
    attend,
    attention_backward,
    attention_reference,
)
from ibeton.model.kernels.residual_norm import Branch, residual_norm, residual_norm_reference
from ibeton.training.timing.flops import flop_counter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cpu" and not interpreted(), reason="wants CUDA or Triton's interpreter"
    ),
    *([] if DEVICE == "cpu" else [pytest.mark.gpu]),
]


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


DTYPES = [torch.float32, torch.float16, *slow(torch.bfloat16)]
# Tokens and width: odd ones, one row, one row over a tile. A norm over a single value has no slope.
SHAPES = [(41, 24), *slow((1, 5), (70, 300), (129, 16))]


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def outcome(function, leaves, upstream):
    """Outputs and the gradients of the leaves."""
    for leaf in leaves:
        leaf.grad = None
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, upstream[: len(outputs)])
    return [o.detach() for o in outputs] + [leaf.grad for leaf in leaves]


def assert_near(mine, reference):
    """Within two roundings of the format of each tensor's largest value, and 1e-5 in float32."""
    for i, (a, b) in enumerate(zip(mine, reference, strict=True)):
        assert a.dtype == b.dtype, i
        assert a.shape == b.shape, i
        error = (a.double() - b.double()).abs().max()
        tolerance = max(1e-5, 2 * torch.finfo(a.dtype).eps)
        assert error <= tolerance * (1e-2 + b.double().abs().max()), (i, float(error))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has", ["nothing", "all", *slow("branch", "bias", "factor")])
def test_residual_norm(shape, dtype, has):
    tokens, width = shape
    leaves = {"x": draw(*shape), "gamma": draw(width, seed=1), "beta": draw(width, seed=2)}
    factor = None
    if has != "nothing":
        leaves["out"] = draw(*shape, dtype=dtype, seed=3)
    if has in ("bias", "all"):
        leaves["bias"] = draw(width, seed=4)
    if has == "all":
        leaves["scale"] = draw(width, seed=5)
    if has in ("factor", "all"):
        factor = (draw(tokens, 1, seed=6) > -0.5) / 0.7
    names = list(leaves)
    values = [leaf.requires_grad_() for leaf in leaves.values()]

    def run(kernel):
        def call(*arguments):
            given = dict(zip(names, arguments, strict=True))
            branch = Branch(given.get("out"), given.get("bias"), given.get("scale"), factor)
            return kernel(given["x"], branch, given["gamma"], given["beta"], 1e-6, dtype)

        return outcome(call, values, [draw(*shape, seed=7), draw(*shape, dtype=dtype, seed=8)])

    assert_near(run(residual_norm), run(residual_norm_reference))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_gelu(shape, dtype):
    leaves = [(3 * draw(*shape, dtype=dtype)).requires_grad_(), draw(shape[1]).requires_grad_()]
    upstream = [draw(*shape, dtype=dtype, seed=1)]
    mine, reference = (
        outcome(function, leaves, upstream) for function in (bias_gelu, bias_gelu_reference)
    )
    assert_near(mine, reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bias_gelu_in_place(shape, dtype):
    x, bias, grad_out = draw(*shape, dtype=dtype), draw(shape[1]), draw(*shape, dtype=dtype, seed=1)
    out = bias_gelu_forward(x, bias)
    partial = torch.full((2, 3, shape[1] + 5), torch.nan, device=DEVICE)
    sums = partial[:, :, 2:-3]
    grad, nothing = bias_gelu_backward(grad_out, x, bias, sums[0])
    assert nothing is None
    again, copy = bias_gelu_backward(grad_out, x, bias, sums[1], with_out=True, in_place=True)
    assert again is grad_out
    assert torch.equal(again, grad)
    assert torch.equal(copy, out)
    assert torch.equal(sums[0], sums[1])
    assert partial[:, :, :2].isnan().all()
    assert partial[:, :, -3:].isnan().all()
    assert bias_gelu_forward(x, bias, in_place=True) is x
    assert torch.equal(x, out)


def test_gelu_holds_far_from_zero():
    """Where the distribution function is close to 0 or 1, relative to what is left of it."""
    x = torch.linspace(-6, 6, 4801, device=DEVICE).view(1, -1)
    out = bias_gelu_forward(x, torch.zeros(x.shape[1], device=DEVICE)).double()
    exact = bias_gelu_reference(x.double(), torch.zeros(x.shape[1], device=DEVICE).double())
    assert (out - exact).abs().max() <= 5e-7
    inner = x.abs() <= 4
    assert ((out - exact).abs() <= 1e-3 * exact.abs())[inner].all()


def near(mine, exact, dtype):
    """Within four roundings of the largest value."""
    tolerance = max(1e-5, 4 * torch.finfo(dtype).eps)
    for a, b in zip(mine, exact, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", [(5, 6, 24), *slow((1, 1, 3), (19, 4, 300))])
def test_embed_tokens(shape, masked, dtype):
    images, patches, width = shape
    product = draw(images * patches, width, dtype=dtype).requires_grad_()
    added = Added(draw(width), draw(1, 1, width), draw(1, 1 + patches, width), draw(1, width))
    masks = draw(images, patches) > 0 if masked else None
    leaves = [product, *(leaf.requires_grad_() for leaf in added)]
    expected = embed_tokens_reference(product, masks, added)
    upstream = draw(*expected.shape)
    expected.backward(upstream)
    out = torch.full_like(expected, torch.nan)
    embed_tokens(product.detach(), masks, Added(*(leaf.detach() for leaf in added)), out)
    grad = torch.empty_like(product)
    partial = torch.full((3, 2 * (1 + patches) * width + 5), torch.nan, device=DEVICE)
    embed_tokens_backward(upstream, masks, grad, partial[:, 2:-3])
    total, seen = partial[:, 2:-3].sum(0).view(2, 1 + patches, width)
    sums = [seen[1:].sum(0), total[:1].unsqueeze(0), total.unsqueeze(0)]
    if masked:
        sums.append((total - seen)[1:].sum(0, keepdim=True))
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert_near([out, grad, *sums], [expected.detach(), *grads])
    assert partial[:, :2].isnan().all()
    assert partial[:, -3:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(21, 24), *slow((1, 2), (70, 300))])
def test_unit_rows(shape, dtype):
    x, bias = draw(*shape, dtype=dtype), draw(shape[1])
    upstream = draw(*shape, dtype=dtype, seed=1)
    leaves = [t.double().requires_grad_() for t in (x, bias)]
    expected = torch.nn.functional.normalize(leaves[0] + leaves[1], dim=-1)
    expected.backward(upstream.double())
    sums = torch.full((3, shape[1]), torch.nan, device=DEVICE)
    units, factor = unit_rows(x, bias, sums, period=5)
    assert torch.equal(unit_rows(x, bias)[0], units)
    patches = torch.arange(shape[0], device=DEVICE) % 5 > 0
    near([units, sums.sum(0)], [expected, expected[patches].sum(0)], dtype)
    partial = torch.full((3, shape[1] + 5), torch.nan, device=DEVICE)
    grad = unit_rows_backward(upstream, x, bias, factor, partial[:, 2:-3])
    near([grad, partial[:, 2:-3].sum(0)], [leaf.grad for leaf in leaves], dtype)
    assert partial[:, :2].isnan().all()
    assert partial[:, -3:].isnan().all()


def test_a_row_of_length_zero_is_divided_by_a_constant():
    bias = draw(24)
    x = (-bias).repeat(2, 1).requires_grad_()
    upstream = draw(2, 24)
    expected = unit_rows_reference(x, bias)
    expected.backward(upstream)
    units, factor = unit_rows(x.detach(), bias)
    assert not units.any()
    grad = unit_rows_backward(upstream, x.detach(), bias, factor, torch.empty(3, 24, device=DEVICE))
    torch.testing.assert_close(grad, x.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("shape", [(21, 24), *slow((1, 3), (70, 300))])
def test_weight_norm(shape, uses, dtype):
    direction, length = draw(*shape), draw(shape[0], 1)
    leaves = [t.double().requires_grad_() for t in (direction, length)]
    expected = weight_norm_reference(*leaves)
    grads = [draw(*shape, seed=5 + i) for i in range(uses)]
    expected.backward(sum(grads).double())
    half, wide = weight_norm(direction, length, dtype, exact=True)
    assert half.dtype is dtype
    assert weight_norm(direction, length, dtype)[1] is None
    near([half], [expected], dtype)
    near([wide], [expected], torch.float32)
    found = weight_norm_backward(grads, direction, length)
    near(found, [leaf.grad for leaf in leaves], torch.float32)


@pytest.mark.parametrize("shape", [(1, 1), (4, 65), (33, 128), (70, 7)])
def test_column_sums(shape):
    assert_near([column_sums(draw(*shape))], [column_sums_reference(draw(*shape))])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [3, *slow(1, 40)])
@pytest.mark.parametrize("strided", [True, *slow(False)])
def test_pack_gradients(dtype, programs, strided):
    images, heads, tokens, channels = 3, 2, 7, 12
    grads = [draw(images, heads, tokens, channels, dtype=dtype, seed=i) for i in range(3)]
    if strided:  # as attention gives them for packed tokens
        grads = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in grads]
    out = grads[0].new_empty(images * tokens, 3 * heads * channels)
    partial = torch.full((programs, out.shape[1] + 5), torch.nan, device=DEVICE)
    pack_gradients(grads, out, partial[:, 2:-3])
    assert partial[:, :2].isnan().all()
    assert partial[:, -3:].isnan().all()
    packed, sums = pack_gradients_reference(grads)
    assert torch.equal(out, packed)
    assert_near([partial[:, 2:-3].sum(0)], [sums])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["kernels", "library"])
@pytest.mark.parametrize(
    "shapes", [[(3, 5), (4, 2)], [(1, 70)], *slow([(1, 1), (1, 9), (2, 3)], [(1, 130), (2, 65)])]
)
def test_attention_of_packed_tokens(dtype, shapes, path, monkeypatch):
    if path == "library":
        monkeypatch.setattr(packed_attention, "matrix_units", lambda _: False)
    heads, width = 2, 24
    counts = [images * tokens for images, tokens in shapes]
    qkv = draw(sum(counts), 3 * width, dtype=dtype)
    upstream = draw(sum(counts), width, dtype=dtype, seed=1)
    partial = torch.full((max(5, len(shapes)), 3 * width + 7), torch.nan, device=DEVICE)
    with flop_counter() as counter:
        attended = attend(qkv, shapes, heads, True)
        grad = attention_backward(upstream, attended, partial[:, 2:-5])
    scores = sum(images * tokens**2 for images, tokens in shapes)
    assert counter.get_total_flops() == 2 * (2 + 5) * scores * width
    assert partial[:, :2].isnan().all()
    assert partial[:, -5:].isnan().all()
    exact = qkv.double().requires_grad_()
    out = torch.cat(
        [
            attention_reference(part, images, tokens, heads)
            for part, (images, tokens) in zip(exact.split(counts), shapes, strict=True)
        ]
    )
    out.backward(upstream.double())
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for mine, expected in (
        (attended.out, out),
        (grad, exact.grad),
        (partial[:, 2:-5].sum(0), exact.grad.sum(0)),
    ):
        assert mine.isfinite().all()
        assert (mine - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("path", ["kernels", "library"])
def test_checkpointed_blocks_keep_no_attention_from_the_forward_on(path, monkeypatch):
    if path == "library":
        monkeypatch.setattr(packed_attention, "matrix_units", lambda _: False)
    made, images = [], draw(2, 3, 32, 32)

    def noted(*args):
        attended = attend(*args)
        made.append(weakref.ref(attended.out))
        return attended

    monkeypatch.setattr(block, "attend", noted)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        sizes = {"embed_dim": 32, "depth": 3, "num_heads": 2, "image_size": 32, "patch_size": 8}
        config = ModelConfig(**sizes, checkpoint_blocks=checkpointed)
        vit = VisionTransformer(config, is_student=False).to(DEVICE)
        made.clear()
        loss = vit(images).square().sum()
        kept = [ref for ref in made if ref() is not None]
        assert len(kept) == (0 if checkpointed else 3)
        loss.backward()
        assert len(made) == (6 if checkpointed else 3)
        assert not any(ref() is not None for ref in made)
        gradients.append([p.grad for p in vit.parameters()])
    torch.testing.assert_close(*gradients)


def test_copies_of_weights_are_those_of_now_and_gone_afterwards():
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).to(DEVICE)
    weight, copies = network[0].weight, HalfWeights([network])
    with torch.autocast(DEVICE, torch.float16):
        for _ in range(2):
            with copies.fresh(draw(1)):
                copy = in_dtype(weight, torch.float16)
                assert in_dtype(weight, torch.float16) is copy
                assert torch.equal(copy, weight.half())
            with torch.no_grad():
                weight.add_(1)
            assert torch.equal(in_dtype(weight, torch.float16), weight.half())
