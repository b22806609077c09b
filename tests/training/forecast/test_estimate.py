"""The arithmetic of a step, held against the model's own code."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ibeton.model import IBOT, build
from ibeton.model.masking import masked_patches
from ibeton.model.reference import forward_reference
from ibeton.training.config import Config, from_values
from ibeton.training.forecast.estimate import (
    FULL,
    HALF,
    Op,
    Rates,
    StepShape,
    flops,
    stage_seconds,
    step_ops,
    step_seconds,
    step_shape,
    weights_of,
)
from ibeton.training.forecast.memory import fixed_bytes, gpu_bytes, kept_bytes, largest_batch
from ibeton.training.timing.flops import flop_counter

IMAGES, MASKED = 4, 0.25


def config(**changed: Any) -> Config:
    small = {
        **{"arch": "vit_t", "embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 8},
        **{"global_crops_size": 64, "local_crops_size": 32, "local_crops_number": 3},
        **{"batch_size": IMAGES, "out_dim": 96, "hidden_dim": 80, "bottleneck_dim": 40},
        **{"drop_path": 0.0, "data": "unused"},
    }
    return from_values(small | changed)


def shape_of(settings: Config, ibot: IBOT, width: int = FULL, plain: bool = False) -> StepShape:
    weights = weights_of(ibot.student, ibot.teacher)
    return replace(step_shape(settings, weights, width, True, plain), masked=MASKED)


def batch(settings: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Views, and masks of a quarter of the patches of every image."""
    data = settings.pipeline
    size, small, cells = data.global_crops_size, data.local_crops_size, 64 // 8
    masks = torch.zeros(2, IMAGES, cells, cells, dtype=torch.bool)
    masks[:, :, : int(MASKED * cells)] = True
    local_crops = torch.randn(data.local_crops_number, IMAGES, 3, small, small)
    return torch.randn(2, IMAGES, 3, size, size), local_crops, masks


@pytest.mark.parametrize("changed", [{}, {"checkpoint_blocks": True}, {"head_layers": 4}])
def test_operations_are_those_that_run(changed: dict[str, Any]) -> None:
    settings = config(**changed)
    ibot = build(settings.model)
    global_crops, local_crops, masks = batch(settings)
    places = masked_patches(masks, torch.device("cpu")).places
    with flop_counter() as teacher, torch.no_grad():
        ibot.teacher.targets(global_crops, places)
    with flop_counter() as student, torch.no_grad():
        ibot.student(global_crops, local_crops, masks, places)
    with flop_counter() as whole:
        ibot(global_crops, local_crops, masks, 0)[0]["loss"].backward()
    ops = step_ops(shape_of(settings, ibot))
    counted = {"teacher": teacher.get_total_flops(), "student": student.get_total_flops()}
    counted["backward"] = whole.get_total_flops() - sum(counted.values())
    for name, count in counted.items():
        assert sum(op.flops for op in ops[name]) == pytest.approx(count, rel=1e-6), name
    assert flops(ops) == pytest.approx(whole.get_total_flops(), rel=1e-6)


def test_operations_of_the_plain_model_are_those_that_run() -> None:
    settings = config()
    ibot = build(settings.model)
    global_crops, local_crops, masks = batch(settings)
    with flop_counter() as whole:
        forward_reference(ibot, global_crops, local_crops, masks, 0)[0]["loss"].backward()
    ops = step_ops(shape_of(settings, ibot, plain=True))
    assert flops(ops) == pytest.approx(whole.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize("width", [FULL, HALF])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_kept_bytes_are_those_that_autograd_keeps(width: int, checkpoint: bool) -> None:
    settings = config(checkpoint_blocks=checkpoint, depth=4)
    ibot = build(settings.model)
    weights = {p.untyped_storage().data_ptr() for p in ibot.parameters()}
    views = batch(settings)
    inputs = {tensor.untyped_storage().data_ptr() for tensor in views}
    kept: dict[int, Tensor] = {}  # a tensor of each piece of memory, which keeps it alive

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights | inputs:
            kept[storage.data_ptr()] = tensor
        return tensor

    places = masked_patches(views[2], torch.device("cpu")).places
    half = torch.autocast("cpu", torch.bfloat16, enabled=width == HALF)
    with half, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ibot.student(*views, places)
    shape = shape_of(settings, ibot, width)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    # Beside them: indices, and half copies of weights, which count with what is fixed.
    assert found == pytest.approx(kept_bytes(shape), rel=0.06)


def test_a_step_takes_what_its_slowest_resource_takes() -> None:
    ops = {"teacher": [Op(100.0, 10.0), Op(0.0, 30.0)], "ema": [Op(0.0, 5.0)]}
    assert stage_seconds(ops, Rates(10.0, 1.0, 1.0)) == {"teacher": 10.0 + 30.0, "ema": 5.0}
    assert stage_seconds(ops, Rates(1.0, 1.0, 10.0)) == {"teacher": 100.0 + 3.0, "ema": 0.5}
    assert stage_seconds({"teacher": [Op(8.0, 1.0, fused=True)]}, Rates(8.0, 2.0, 1.0)) == {
        "teacher": 4.0
    }


def test_small_steps_wait_for_the_host() -> None:
    shape = shape_of(config(), build(config().model))
    device = step_seconds(shape, Rates(1e12, 1e12, 1e12))
    assert step_seconds(shape, Rates(1e12, 1e12, 1e12, launch=1e-9)) == device
    assert step_seconds(shape, Rates(1e12, 1e12, 1e12, launch=1e-3)) == pytest.approx(0.44)


def test_parts_of_a_batch_need_less_memory_and_no_less_work() -> None:
    ibot = build(config().model)
    whole, parts = (shape_of(config(micro_steps=n), ibot) for n in (1, 2))
    assert kept_bytes(parts) == pytest.approx(kept_bytes(whole) / 2)
    assert flops(step_ops(parts)) == pytest.approx(flops(step_ops(whole)), rel=1e-3)


def test_stochastic_depth_leaves_work_out_on_a_cpu_alone() -> None:
    settings = config(drop_path=0.2)
    on_cpu, on_gpu = (step_shape(settings, (1, 1), FULL, gpu) for gpu in (False, True))
    assert 0.9 < flops(step_ops(on_cpu)) / flops(step_ops(on_gpu)) < 0.97
    assert kept_bytes(on_cpu) < kept_bytes(on_gpu)


def test_the_largest_batch_just_fits() -> None:
    shape = step_shape(config(), (1000, 900), HALF, True)

    def need(images: int) -> float:
        return sum(gpu_bytes(replace(shape, images=images), 8, photo_bytes=6e5).values())

    room = 4 * 2**30
    most = largest_batch(need, room)
    assert need(most) <= room < need(most + 1)
    assert largest_batch(need, 2**20) == 0, "not even one image"


def test_fixed_memory_is_weights_gradients_and_moments() -> None:
    shape = step_shape(config(), (1000, 900), HALF, True)
    alone, many = (sum(fixed_bytes(shape, processes).values()) for processes in (1, 8))
    assert alone == 4 * (1000 + 900 + 2 * 1000 + 1000) + 2 * 1000
    assert many - alone == 4 * 1000, "the buckets of DDP"


def test_swin_is_refused_by_name() -> None:
    settings = from_values({"arch": "swin_t7", "data": "unused"})
    with pytest.raises(ValueError, match="--arch swin_t7: only ViTs"):
        step_shape(settings, (1, 1), FULL, True)
