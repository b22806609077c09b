"""The check of the kernels before a run. On CUDA where there is a device, else in Triton's
interpreter: `test_interpreted.py` runs this file."""

from dataclasses import replace

import pytest
import torch

from ibeton.command import Failure
from ibeton.model import ModelConfig
from ibeton.model.fused import block, check
from ibeton.model.fused.check import kernel_fault
from ibeton.model.kernels.launch import interpreted, kernels_run_on, switch_off

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.skipif(
        DEVICE.type == "cpu" and not interpreted(), reason="wants CUDA or Triton's interpreter"
    ),
    *([] if DEVICE.type == "cpu" else [pytest.mark.gpu]),
]
SMALL = ModelConfig(
    **{"embed_dim": 32, "depth": 4, "num_heads": 2, "patch_size": 8, "image_size": 32},
    **{"hidden_dim": 48, "bottleneck_dim": 16, "out_dim": 64, "local_crops_number": 2},
)


def fault(dtype=None, config=SMALL):
    return kernel_fault(config, (32, 16), DEVICE, dtype)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_right_kernels_pass_and_stay_on_and_no_number_of_the_caller_is_drawn(dtype):
    state = torch.get_rng_state()
    assert fault(dtype) == ""
    assert torch.equal(torch.get_rng_state(), state)
    assert kernels_run_on(torch.zeros(1, device=DEVICE))
    switch_off()
    assert not kernels_run_on(torch.zeros(1, device=DEVICE))
    switch_off(False)


@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, pred_start_epoch=50, warmup_teacher_temp_epochs=30, micro_steps=4),
        replace(
            ModelConfig(arch="swin_t7", patch_size=32, pred_start_epoch=50),  # as in its recipe
            **{"embed_dim": 24, "image_size": 64, "hidden_dim": 48, "bottleneck_dim": 16},
            **{"out_dim": 64, "local_crops_number": 2},
        ),
    ],
    ids=["schedules", "swin"],
)
def test_every_recipe_passes(config):
    sizes = (64, 32) if config.patch_size == 32 else (32, 16)
    assert kernel_fault(config, sizes, DEVICE, None) == ""


def test_a_wrong_kernel_is_found(monkeypatch):
    right = block.attend

    def wrong(*args):
        attended = right(*args)
        attended.out.mul_(0.5)
        return attended

    monkeypatch.setattr(block, "attend", wrong)
    assert fault().startswith("their ")


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_kernels_are_not_blamed_for_gradients_that_are_infinite_without_them(dtype):
    cold = replace(SMALL, student_temp=1e-40)  # logits overflow
    assert fault(dtype, cold).startswith("the two cannot be compared: without the kernels too")


def test_a_kernel_that_fails_is_named_and_a_broken_device_ends_the_run(monkeypatch):
    def fails(*args):
        raise RuntimeError("ptxas: no such instruction\nmore")

    monkeypatch.setattr(block, "attend", fails)
    assert fault() == "RuntimeError: ptxas: no such instruction"
    nowhere = torch.device("cuda", 99)  # as unusable as a device after an illegal access
    with pytest.raises(Failure, match=r"a kernel broke the device \(ptxas\): give --kernels off"):
        check._check_usable(nowhere, "ptxas")
