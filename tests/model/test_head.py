"""The projection head against the published one."""

import numpy as np
import pytest
import torch

from ibeton.model import ModelConfig
from ibeton.model.head import IBOTHead

CASES = (
    "shared1_norm1",
    "shared1_norm0",
    "shared0_norm1",
    "shared0_norm0",
    "shared1_norm1_ln",
    "shared1_norm1_bn",
)


@pytest.fixture
def arrays(reference):
    return reference("head")


def build_head(arrays, shared, norm_last_layer=True, norm_in_head="none"):
    config = ModelConfig(
        embed_dim=int(arrays["in_dim"]),
        out_dim=int(arrays["out_dim"]),
        patch_out_dim=int(arrays["patch_out_dim"]),
        shared_head=shared,
        shared_head_teacher=shared,
        norm_last_layer=norm_last_layer,
        norm_in_head=norm_in_head,
        hidden_dim=int(arrays["hidden_dim"]),
        bottleneck_dim=int(arrays["bottleneck_dim"]),
        head_layers=int(arrays["nlayers"]),
    )
    return IBOTHead(config, is_student=True)


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def head(arrays, under, case):
    norm = case.rsplit("_", 1)[1]
    head = build_head(
        arrays, "shared1" in case, "norm1" in case, norm if len(norm) == 2 else "none"
    )
    head.load_state_dict(under(arrays, f"{case}/state/"))
    return head


def test_names_and_what_trains(arrays, under, case, head):
    assert list(head.state_dict()) == list(under(arrays, f"{case}/state/"))
    named = dict(head.named_parameters())
    assert list(named) == list(arrays[f"{case}/named_parameters"])
    trained = [name for name, parameter in named.items() if parameter.requires_grad]
    assert trained == list(arrays[f"{case}/requires_grad"])


def test_outputs_and_gradients(arrays, under, assert_near, case, head):
    tokens = torch.from_numpy(arrays[f"{case}/tokens"]).requires_grad_()
    cls, patch = head(tokens)
    assert_near(cls, arrays[f"{case}/cls_out"])
    assert_near(patch, arrays[f"{case}/patch_out"])
    ramp = [torch.linspace(-1, 1, cls.numel()), torch.linspace(1, -1, patch.numel())]
    ((cls.flatten() * ramp[0]).sum() + (patch.flatten() * ramp[1]).sum()).backward()
    assert_near(tokens.grad, arrays[f"{case}/grad_tokens"])
    gradients = under(arrays, f"{case}/grad/")
    assert gradients
    for name, expected in gradients.items():
        gradient = head.get_parameter(name).grad
        if case.endswith("_bn") and name in ("mlp.0.bias", "mlp.3.bias"):
            # Batch norm takes any shift away again: both sides are rounding around zero.
            assert gradient.abs().max() < 1e-5
        else:
            assert_near(gradient, expected, what=name)


def test_two_dimensions_are_class_tokens(arrays, assert_near, case, head):
    if head.couples_tokens():  # the reference: evaluation mode after one training forward
        head(torch.from_numpy(arrays[f"{case}/tokens"]))
        head.eval()
    logits = head.cls_logits(torch.from_numpy(arrays[f"{case}/cls_only_in"]))
    assert_near(logits, arrays[f"{case}/cls_only_out"])


@pytest.mark.parametrize("case", CASES[:4], indirect=True)
def test_outputs_in_float64(arrays, assert_near, case, head):
    cls, patch = head.double()(torch.from_numpy(arrays[f"{case}/tokens"]).double())
    assert_near(cls, arrays[f"{case}/cls_out_f64"], 1e-13)
    assert_near(patch, arrays[f"{case}/patch_out_f64"], 1e-13)


@pytest.mark.parametrize("case", ["shared1_norm1_bn"], indirect=True)
def test_batch_statistics_move_twice_a_forward(arrays, under, assert_near, case, head):
    tokens = torch.from_numpy(arrays[f"{case}/tokens"])
    head(tokens)
    for name, expected in under(arrays, f"{case}/state_after_one_forward/").items():
        # num_batches_tracked is 2: one norm object, used twice
        assert_near(head.state_dict()[name], expected, what=name)
    cls, patch = head.eval()(tokens)
    assert_near(cls, arrays[f"{case}/cls_out_eval"])
    assert_near(patch, arrays[f"{case}/patch_out_eval"])


@pytest.mark.parametrize("case", ["shared1_norm1_bn"], indirect=True)
def test_synchronized_norm_stays_one_object(head):
    before = dict(head.named_parameters())
    head.sync_batch_norm()
    assert isinstance(head.mlp[1], torch.nn.SyncBatchNorm)
    assert head.mlp[4] is head.mlp[1]
    after = dict(head.named_parameters())
    assert {name: id(p) for name, p in after.items()} == {n: id(p) for n, p in before.items()}


def test_shared_head_takes_the_patch_layer_of_an_unshared_state(arrays):
    teacher = build_head(arrays, shared=True)
    state = teacher.state_dict()
    for layer in ("last_layer", "last_layer2"):
        key = f"{layer}.weight_v"
        state[key] = torch.from_numpy(arrays[f"mixed_load/student_{key}"])
    teacher.load_state_dict(state)
    assert bool(arrays["mixed_load/teacher_equals_student_last_layer2"])
    loaded = teacher.last_layer.weight_v.detach().numpy()
    assert np.array_equal(loaded, arrays["mixed_load/teacher_last_layer.weight_v"])
    assert np.array_equal(loaded, arrays["mixed_load/student_last_layer2.weight_v"])


def test_rows_of_the_last_layer_have_norm_g(arrays):
    layer = build_head(arrays, shared=True).last_layer
    with torch.no_grad():
        layer.weight_g.uniform_(0.5, 2)
    torch.testing.assert_close(layer.weight().norm(dim=1, keepdim=True), layer.weight_g)


def test_bottleneck_of_half_precision_tokens_does_not_overflow(arrays):
    head = build_head(arrays, shared=True).half()
    with torch.no_grad():
        head.mlp[-1].bias.fill_(1000.0)  # its square is beyond fp16
        out = head.bottleneck(torch.zeros(2, 48, dtype=torch.float16))
    torch.testing.assert_close(out.float().norm(dim=-1), torch.ones(2), rtol=1e-3, atol=0)
