"""The fused update against the plain one: same weights, moments, teacher, scale, and copies. On
CUDA where there is a device, else in Triton's interpreter: `test_interpreted.py` runs this file."""

import copy

import pytest
import torch

from ibeton.model import ModelConfig, build
from ibeton.model.fused.update import FusedUpdate
from ibeton.model.kernels.launch import interpreted
from ibeton.model.optim import build_optimizer, load_optimizer_state, optimizer_state
from ibeton.model.steps import Step, StepInputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cpu" and not interpreted(), reason="wants CUDA or Triton's interpreter"
    ),
    *([] if DEVICE == "cpu" else [pytest.mark.gpu]),
]
SMALL = {
    **{"embed_dim": 20, "depth": 1, "num_heads": 2, "patch_size": 8, "image_size": 16},
    **{"hidden_dim": 93, "bottleneck_dim": 16, "out_dim": 33, "norm_last_layer": True},
}


def steps(count, fused, scaled, clip, monkeypatch):
    """State after `count` updates with the same gradients, some of which are not finite."""
    torch.manual_seed(0)
    ibot = build(ModelConfig(**SMALL)).to(DEVICE)
    optimizer = build_optimizer(ibot.student)
    scaler = torch.amp.GradScaler(DEVICE, 2.0**10, growth_interval=2) if scaled else None
    step, seen = Step(ibot, optimizer, scaler, clip_grad=clip), []
    if not fused:
        monkeypatch.setattr(step._update, "runs", lambda: False)
    ibot.half_weights._make(torch.float16)
    for i in range(count):
        torch.manual_seed(10 + i)
        scale = 1.0 if scaler is None else scaler.scale(torch.ones((), device=DEVICE)).item()
        for parameter in ibot.student.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter) * scale * (1 + i)
        if i in (2, 5):
            ibot.student.head.mlp[0].weight.grad[3, 1] = float("inf" if i == 2 else "nan")
        if i == 3:  # as after a rollback
            load_optimizer_state(optimizer, copy.deepcopy(optimizer_state(optimizer)))
        rates = torch.tensor([1e-2 * (1 + i), 0.1, 0.9, 0, 0], dtype=torch.float64, device=DEVICE)
        inputs = StepInputs(*[torch.empty(0)] * 5, rates)
        norm, skipped = (
            step._update(rates, scaler, frozen=i < 2)
            if fused
            else step._update_plainly(inputs, epoch=0 if i < 2 else 1)
        )
        seen.append((norm.item(), bool(skipped)))
    states = [optimizer.state[p] for p in ibot.student.parameters() if p.requires_grad]
    moments = [state[name] for state in states for name in sorted(state)]
    scale = [] if scaler is None else [torch.tensor(scaler.get_scale())]
    return seen, [t.detach().clone() for t in (*ibot.state_dict().values(), *moments, *scale)], ibot


@pytest.mark.parametrize(
    ("clip", "scaled"),
    [
        (3.0, True),
        (0.0, False),
        pytest.param(3.0, False, marks=pytest.mark.slow),
        pytest.param(0.0, True, marks=pytest.mark.slow),
    ],
)
def test_the_fused_update_is_the_plain_one(scaled, clip, monkeypatch):
    mine, state, ibot = steps(7, True, scaled, clip, monkeypatch)
    expected, plain, _ = steps(7, False, scaled, clip, monkeypatch)
    assert [skipped for _, skipped in mine] == [i in (2, 5) for i in range(7)]
    for (norm, skipped), (norm_too, skipped_too) in zip(mine, expected, strict=True):
        assert skipped == skipped_too
        assert norm == pytest.approx(norm_too, rel=1e-5, nan_ok=True)
    assert len(state) == len(plain)
    for one, other in zip(state, plain, strict=True):
        assert (one - other).abs().max() <= 2e-6 * (1 + other.abs().max())
    for weight, half in ibot.half_weights.copies.items():
        assert torch.equal(half, weight.detach().half())


def test_copies_are_made_anew_after_pytorch_has_changed_a_weight(monkeypatch):
    ibot = steps(1, True, False, 3.0, monkeypatch)[2]
    with torch.no_grad():
        ibot.student.head.mlp[0].weight.add_(1)
    ibot.half_weights.refresh()
    for weight, half in ibot.half_weights.copies.items():
        assert torch.equal(half, weight.detach().half())


def test_other_optimizers_and_layouts_are_left_to_pytorch():
    ibot = build(ModelConfig(**SMALL)).to(DEVICE)
    assert FusedUpdate(ibot, build_optimizer(ibot.student), 3.0).runs()
    assert not FusedUpdate(ibot, build_optimizer(ibot.student, "sgd"), 3.0).runs()
    weight = ibot.student.head.mlp[0].weight
    weight.grad = torch.zeros_like(weight).t().contiguous().t()
    assert not FusedUpdate(ibot, build_optimizer(ibot.student), 3.0).runs()
    assert not FusedUpdate(ibot.double(), build_optimizer(ibot.student), 3.0).runs()
