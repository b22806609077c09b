"""Clipping, freezing and optimizers against the published ones."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from ibeton.model import ModelConfig, build
from ibeton.model.kernels.launch import counting
from ibeton.model.optim import (
    LARS,
    build_optimizer,
    cancel_last_layer_gradients,
    clip_gradients,
    parameter_groups,
)
from ibeton.model.steps import Step, StepInputs


@pytest.fixture
def arrays(reference):
    return reference("optim")


@pytest.mark.parametrize("i", [0, 1])
def test_each_gradient_is_clipped_by_itself(arrays, under, i):
    before, after = under(arrays, f"clip{i}/before/"), under(arrays, f"clip{i}/after/")
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in before.values()]
    for parameter, gradient in zip(parameters, before.values(), strict=True):
        parameter.grad = gradient.clone()
    norms = clip_gradients(parameters, float(arrays[f"clip{i}/clip"]))
    np.testing.assert_allclose(norms, arrays[f"clip{i}/norms"], rtol=1e-7)
    for parameter, expected in zip(parameters, after.values(), strict=True):
        np.testing.assert_allclose(parameter.grad, expected, rtol=1e-7)


def test_clipping_at_zero_only_measures():
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 50.0)
    assert clip_gradients([parameter], 0.0).tolist() == [100.0]
    assert parameter.grad.tolist() == [50.0] * 4


def test_clipping_passes_over_parameters_without_gradient():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    parameters[1].grad = torch.tensor([3.0, 4.0])
    assert clip_gradients(parameters, 1.0).tolist() == [5.0]
    assert parameters[0].grad is None
    assert parameters[1].grad.tolist() == pytest.approx([0.6, 0.8])


def test_clipping_without_any_gradient_is_refused():
    with pytest.raises(ValueError, match="call backward first"):
        clip_gradients([nn.Parameter(torch.zeros(2))], 1.0)


def test_lars(arrays, under):
    parameters = {n: nn.Parameter(t) for n, t in under(arrays, "lars/init/").items()}
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": float(arrays["lars/weight_decay_group0"])},
        {"params": vectors, "weight_decay": float(arrays["lars/weight_decay_group1"])},
    ]
    optimizer = LARS(
        groups,
        lr=float(arrays["lars/lr"]),
        momentum=float(arrays["lars/momentum"]),
        eta=float(arrays["lars/eta"]),
    )
    for i in range(4):
        for name, gradient in under(arrays, f"lars/step{i}/grad/").items():
            parameters[name].grad = gradient
        optimizer.step()
        for name, expected in under(arrays, f"lars/step{i}/after/").items():
            # 1e-7 of float32 values around 1: the last bit
            np.testing.assert_allclose(parameters[name].detach(), expected, rtol=2e-7, atol=1e-8)


def test_lars_takes_a_zero_tensor_by_the_plain_step():
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    LARS([weight], lr=0.5).step()
    assert weight.detach().tolist() == [[-0.5, -0.5], [-0.5, -0.5]]


def test_lars_calls_its_closure():
    weight = nn.Parameter(torch.ones(2))

    def closure():
        loss = weight.sum()
        loss.backward()
        return loss

    assert LARS([weight], lr=0.5).step(closure) == 2
    assert weight.tolist() == [0.5, 0.5]


class Named(nn.Module):
    """One parameter of each kind that grouping and freezing tell apart."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)
        self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
        self.last_layer = nn.Linear(4, 4)
        self.last_layer2 = nn.Linear(4, 4)


def test_what_decays():
    module = Named()
    names = {id(p): name for name, p in module.named_parameters()}
    decayed, rest = ([names[id(p)] for p in g["params"]] for g in parameter_groups(module))
    assert decayed == ["cls_token", "linear.weight", "last_layer.weight", "last_layer2.weight"]
    biases = ["linear.bias", "last_layer.bias", "last_layer2.bias"]
    assert rest == ["norm.weight", "norm.bias", *biases]


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_optimizers_step_downhill(name):
    module = Named()
    optimizer = build_optimizer(module, name)
    assert optimizer.param_groups[1]["weight_decay"] == 0
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    x, losses = torch.randn(8, 4), []
    for _ in range(5):
        loss = (module.last_layer(module.norm(module.linear(x))) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="--optimizer adam: expected one of adamw, sgd, lars"):
        build_optimizer(Named(), "adam")


def test_last_layers_are_frozen_for_the_first_epochs_only():
    module = Named()
    for epoch, dropped in ((0, True), (1, True), (2, False)):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        cancel_last_layer_gradients(module, epoch, freeze_epochs=2)
        without = {name for name, p in module.named_parameters() if p.grad is None}
        last = {n for n, _ in module.named_parameters() if n.startswith("last_layer")}
        assert without == (last if dropped else set())


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_kernels_get_only_tensors_of_the_device(name, monkeypatch):
    """Triton refuses others. The meta device, which computes nothing, stands for a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # unknown there
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    options = {"depth": 1, "out_dim": 64, "epochs": 2, "warmup_teacher_temp_epochs": 1}
    ibot = build(ModelConfig(arch="vit_t", drop_path=0.0, **options)).to("meta")
    inputs = StepInputs(
        torch.empty(2, 2, 3, 224, 224, device="meta"),
        torch.empty(10, 2, 3, 96, 96, device="meta"),
        torch.empty(2, 2, 14, 14, dtype=torch.bool, device="meta"),
        torch.empty(1, 8, dtype=torch.int64, device="meta"),
        torch.empty(1, 8, dtype=torch.float64, device="meta"),
        torch.empty(5, dtype=torch.float64),  # the rates stay on the host for SGD and LARS
    )
    launches = []
    with counting(launches.append):
        Step(ibot, build_optimizer(ibot.student, name), None).compute_gradients(inputs, 1)
    assert {"_row_kernel", "_class_metrics_kernel"} <= {launch.name for launch in launches}
    away = {one.name for one in launches for t in one.tensors() if t.device.type != "meta"}
    assert away == set()
