"""Linear layers that compute their input again: against norm or GELU and a plain linear layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ibeton.model.kernels.recomputing import gelu_linear, norm_linear

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def kernel(name, bias):
    """(fused, reference, modules), each function taking tokens [T, 24]."""
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias)
    if name == "gelu":
        return (
            lambda x: gelu_linear(x, linear),
            lambda x: linear(F.gelu(x)),
            nn.ModuleList([linear]),
        )
    norm = nn.LayerNorm(24, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return (
        lambda x: norm_linear(x, norm, linear),
        lambda x: linear(norm(x)),
        nn.ModuleList([norm, linear]),
    )


def outputs(function, modules, x, upstream):
    modules.zero_grad()
    x = x.clone().requires_grad_()
    out = function(x)
    out.backward(upstream.to(out.dtype))
    return out.detach(), x.grad, *(p.grad.clone() for p in modules.parameters())


@pytest.mark.parametrize("name", ["norm", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients(name, bias, tokens, dtype):
    fused, plain, modules = kernel(name, bias)
    modules.to(dtype)
    x, upstream = 3 * torch.randn(tokens, 24, dtype=dtype), torch.randn(tokens, 40, dtype=dtype)
    for mine, theirs in zip(
        outputs(fused, modules, x, upstream), outputs(plain, modules, x, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["norm", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(name, dtype):
    fused, plain, modules = kernel(name, True)
    x, upstream = torch.randn(64, 24), torch.randn(64, 40)
    if name == "gelu":  # what enters a GELU came out of a linear layer
        x = x.to(dtype)
    with torch.autocast("cpu", dtype):
        mine, theirs = fused(x), plain(x)
    assert mine.dtype == theirs.dtype == dtype

    def under_autocast(function):
        def call(x):
            with torch.autocast("cpu", dtype):
                return function(x)

        return call

    pairs = zip(
        outputs(under_autocast(fused), modules, x, upstream),
        outputs(under_autocast(plain), modules, x, upstream),
        strict=True,
    )
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        tolerance = 4 * torch.finfo(dtype).eps
        error = (mine.float() - theirs.float()).abs().max()
        assert error <= tolerance * theirs.float().abs().max()


@pytest.mark.parametrize("name", ["norm", "gelu"])
def test_what_is_kept_for_the_backward(name):
    """No tensor of the output's or the recomputed input's size: only the tokens that came in."""
    fused, plain, _ = kernel(name, True)
    x = torch.randn(1000, 24, requires_grad=True)

    def kept(function):
        sizes = {}

        def note(tensor):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            function(x)
        return sum(sizes.values())

    assert kept(plain) - kept(fused) >= 24_000 * 0.99


@pytest.mark.parametrize("name", ["norm", "gelu"])
def test_gradient_by_differences(name):
    fused, _, modules = kernel(name, True)
    modules.double()
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fused, x)
