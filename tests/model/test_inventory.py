"""Names, shapes, groups and initial values against the published checkpoints' inventory."""

import json

import numpy as np
import pytest
import torch
from paths import REFERENCE

from ibeton.model import ModelConfig, build
from ibeton.model.optim import build_optimizer, parameter_groups

INVENTORY = REFERENCE / "checkpoint_inventory.json"
ENTRIES = {"vit_small_16": "vit_s", "vit_base_16": "vit_b", "vit_large_16": "vit_l"}


@pytest.fixture(scope="module")
def inventory():
    return json.loads(INVENTORY.read_text())


@pytest.fixture(params=ENTRIES)
def entry(inventory, request):
    return inventory[request.param] | {"config_arch": ENTRIES[request.param]}


def build_entry(entry, device):
    config = ModelConfig(
        arch=entry["config_arch"],
        patch_size=entry["build"]["patch_size"],
        out_dim=entry["out_dim"],
        shared_head=entry["shared_head"],
        norm_last_layer=entry["norm_last_layer"],
    )
    with torch.device(device):
        return build(config)


def shapes(module):
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def test_names_shapes_and_groups(entry):
    ibot = build_entry(entry, "meta")
    student = {f"module.{name}": shape for name, shape in shapes(ibot.student).items()}
    assert list(student.items()) == list(entry["student"].items())
    assert list(shapes(ibot.teacher).items()) == list(entry["teacher"].items())
    assert shapes(ibot.loss) == entry["ibot_loss"]
    names = {id(p): f"module.{name}" for name, p in ibot.student.named_parameters()}
    groups = [[names[id(p)] for p in g["params"]] for g in parameter_groups(ibot.student)]
    assert groups[0] == entry["optimizer_group0_decayed"]
    assert groups[1] == entry["optimizer_group1_not_decayed"]
    frozen = [f"module.{n}" for n, p in ibot.student.named_parameters() if not p.requires_grad]
    assert frozen == entry["frozen"]


def test_parameter_counts(entry):
    ibot = build_entry(entry, "meta")
    count = {
        "n_student_backbone": ibot.student.backbone,
        "n_teacher_backbone": ibot.teacher.backbone,
        "n_head": ibot.student.head,
    }
    for name, module in count.items():
        assert sum(p.numel() for p in module.parameters()) == entry[name], name


def test_fresh_values_are_drawn_as_published(inventory):
    entry = inventory["vit_small_16"] | {"config_arch": "vit_s"}
    torch.manual_seed(0)
    state = build_entry(entry, "cpu").student.state_dict()
    fresh = entry["fresh_init_mean_std_min_max"]
    assert {f"module.{name}" for name in state} == set(fresh)
    for name, tensor in state.items():
        mean, std, low, high = fresh[f"module.{name}"]
        values = tensor.double()
        if std == 0:
            assert (values == mean).all(), name
            continue
        n = values.numel()
        assert abs(values.mean() - mean) < 6 * std * (2 / n) ** 0.5, name
        assert abs(values.std() / std - 1) < 6 / n**0.5, name
        # Extremes of a normal of this size wander by about a tenth; a uniform's not at all.
        spread = 0.02 if "patch_embed" in name or "last_layer" in name else 0.5
        extremes = np.array([values.min(), values.max()])
        np.testing.assert_allclose(extremes, [low, high], rtol=spread, err_msg=name)


def test_state_of_the_optimizer_is_that_of_adamw():
    config = ModelConfig(embed_dim=16, depth=1, num_heads=1, hidden_dim=8, out_dim=8)
    student = build(config).student
    optimizer = build_optimizer(student)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state_dict()
    assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert [i for group in state["param_groups"] for i in group["params"]] == list(state["state"])
