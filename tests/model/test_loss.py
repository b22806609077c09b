"""The loss against the published one: values, gradients, centers, temperatures, two ranks."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from paths import REFERENCE

from ibeton.model import ModelConfig
from ibeton.model.loss import IBOTLoss
from ibeton.model.masking import masked_patches
from ibeton.model.network import Targets
from ibeton.model.reference import loss_reference

CASES = ("k_small", "k_large", "late_mim", "two_dims_lambda", "no_local", "three_globals")
PUBLISHED_NAMES = {
    "nepochs": "epochs",
    "ngcrops": "global_crops_number",
    "nlcrops": "local_crops_number",
    "warmup_teacher_temp2": "warmup_teacher_patch_temp",
    "teacher_temp2": "teacher_patch_temp",
    "mim_start_epoch": "pred_start_epoch",
}
LOGITS = ("student_cls", "student_patch", "student_local_cls", "teacher_cls", "teacher_patch")


def build_loss(arrays, case):
    prefix = f"{case}/ctor/"
    options = {key[len(prefix) :]: v.item() for key, v in arrays.items() if key.startswith(prefix)}
    fields = {PUBLISHED_NAMES.get(name, name): v for name, v in options.items()}
    unshared = {"shared_head": False, "shared_head_teacher": False}  # K2 is then its own setting
    return IBOTLoss(ModelConfig(**fields, **unshared))


def steps_of(arrays, case):
    """The tensors of each step of a case, by name."""
    count = sum(key.startswith(f"{case}/step") and key.endswith("/epoch") for key in arrays)
    for i in range(count):
        prefix = f"{case}/step{i}/"
        yield {
            key[len(prefix) :]: torch.from_numpy(np.array(value))
            for key, value in arrays.items()
            if key.startswith(prefix)
        }


@pytest.fixture(params=["fused", "reference"])
def way(request):
    return request.param


def run(loss, step, way="fused", dtype=torch.float32):
    """(terms, leaf logits) of one step. The fused loss gets the masked patches alone."""
    logits = {name: step[name].to(dtype, copy=True) for name in LOGITS if name in step}
    for name in logits:
        logits[name].requires_grad_(name.startswith("student"))
    student = [logits.get(n) for n in LOGITS[:3]]
    teacher_cls, teacher_patch = logits["teacher_cls"], logits["teacher_patch"]
    epoch = int(step["epoch"])
    if way == "reference":
        terms, means = loss_reference(
            loss, student, teacher_cls, teacher_patch, step["masks"], epoch
        )
    else:
        patches = masked_patches(
            step["masks"].reshape(loss.global_views, -1, 1, teacher_patch.shape[1]),
            torch.device("cpu"),
        )
        student[1] = student[1].flatten(0, 1)[patches.places]
        targets = Targets(
            teacher_cls,
            teacher_patch.flatten(0, 1)[patches.places],
            teacher_patch.to(torch.promote_types(dtype, torch.float32)).mean(dim=(0, 1)),
        )
        terms, means = loss(tuple(student), targets, patches, epoch)
    loss.update_centers([means])
    return terms, logits


@pytest.fixture
def arrays(reference):
    return reference("loss")


@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_centers(arrays, assert_near, case, way):
    loss = build_loss(arrays, case)
    steps = list(steps_of(arrays, case))
    assert len(steps) >= 2
    for i, step in enumerate(steps):
        if i == 0:
            assert list(loss.state_dict()) == ["center", "center2"]
            loss.center.copy_(step["center_before"])
            loss.center2.copy_(step["center2_before"])
        terms, logits = run(loss, step, way)
        for name, key in (("cls", "loss_cls"), ("patch", "loss_patch"), ("loss", "loss")):
            assert_near(terms[name], step[key], what=f"step {i} {name}")
        terms["loss"].backward()
        for name, leaf in logits.items():
            if name.startswith("student"):
                assert_near(leaf.grad, step[f"grad_{name}"], what=f"step {i} {name}")
            else:
                assert leaf.grad is None
        assert_near(loss.center, step["center_after"], what=f"step {i} center")
        assert_near(loss.center2, step["center2_after"], what=f"step {i} center2")


@pytest.mark.parametrize("case", CASES)
def test_temperature_schedules(arrays, case):
    loss = build_loss(arrays, case)
    np.testing.assert_allclose(loss.teacher_temps, arrays[f"{case}/teacher_temp_schedule"], 1e-12)
    patch = arrays[f"{case}/teacher_patch_temp_schedule"]
    np.testing.assert_allclose(loss.teacher_patch_temps, patch, 1e-12)


def test_without_masks_the_patch_loss_is_zero_but_its_center_moves(arrays, way):
    loss = build_loss(arrays, "k_small")
    step = next(steps_of(arrays, "k_small"))
    step["masks"] = torch.zeros_like(step["masks"])
    terms, logits = run(loss, step, way)
    terms["loss"].backward()
    assert terms["patch"] == 0
    assert not logits["student_patch"].grad.any()
    assert loss.center2.abs().min() > 0


def test_half_precision_logits_are_computed_in_float32(arrays):
    step = next(steps_of(arrays, "k_small"))  # multiples of 1/64 below 32 are exact in fp16
    assert torch.equal(step["student_patch"].half().float(), step["student_patch"])
    in_half, _ = run(build_loss(arrays, "k_small"), step, dtype=torch.float16)
    in_full, _ = run(build_loss(arrays, "k_small"), step)
    assert in_half["loss"].dtype == torch.float32
    assert torch.equal(in_half["loss"], in_full["loss"])


def test_entropy_of_equal_teacher_logits_is_that_of_a_uniform_choice(arrays):
    step = next(steps_of(arrays, "k_small"))
    step["teacher_cls"] = torch.zeros_like(step["teacher_cls"])
    terms, _ = run(build_loss(arrays, "k_small"), step)
    assert terms["teacher_entropy"].item() == pytest.approx(math.log(64), rel=1e-6)


def test_accuracy_compares_first_teacher_view_with_second_student_view(arrays):
    step = next(steps_of(arrays, "k_small"))
    batch = len(step["student_cls"]) // 2
    step["student_cls"][batch:] = step["teacher_cls"][:batch]
    terms, _ = run(build_loss(arrays, "k_small"), step)
    assert terms["acc"] == 1
    step["student_cls"][batch] = -step["student_cls"][batch]
    terms, _ = run(build_loss(arrays, "k_small"), step)
    assert terms["acc"].item() == pytest.approx(1 - 1 / batch)


def _rank(rank: int, folder: str) -> None:
    """One real process of two: every number against the reference, on this rank's own logits."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    with np.load(REFERENCE / "loss_two_processes.npz") as file:
        arrays = {key: file[key] for key in file.files}
    loss = IBOTLoss(ModelConfig(out_dim=64, local_crops_number=4, epochs=100, teacher_temp=0.07))
    steps = list(steps_of(arrays, f"rank{rank}"))
    assert len(steps) == 3
    for i, step in enumerate(steps):
        terms, _ = run(loss, step, ("fused", "reference")[i % 2])
        for name, key in (("cls", "loss_cls"), ("patch", "loss_patch"), ("loss", "loss")):
            torch.testing.assert_close(terms[name].detach(), step[key], rtol=1e-5, atol=0)
        torch.testing.assert_close(loss.center, step["center_after"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss.center2, step["center2_after"], rtol=1e-5, atol=1e-6)
    Path(folder, f"done{rank}").touch()
    dist.destroy_process_group()


def test_two_ranks_share_centers_but_not_losses(tmp_path):
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    assert sorted(path.name for path in tmp_path.glob("done*")) == ["done0", "done1"]


def test_misfits_are_refused(arrays):
    loss = build_loss(arrays, "k_small")
    step = next(steps_of(arrays, "k_small"))
    with pytest.raises(ValueError, match="epoch 100 is outside the schedule of --epochs 100"):
        run(loss, {**step, "epoch": torch.tensor(100)})
    with pytest.raises(ValueError, match="27 local class logits for 3 images"):
        run(loss, {**step, "student_local_cls": step["student_local_cls"][:27]})
    with pytest.raises(ValueError, match="5 class logits are not 2 views"):
        run(loss, {**step, "student_cls": step["student_cls"][:5]})
    with pytest.raises(ValueError, match="expected the same shapes"):
        run(loss, {**step, "teacher_cls": step["teacher_cls"][:, :3]})
    cls, patch = torch.zeros(6, 64), torch.zeros(4, 64)
    patches = masked_patches(torch.ones(2, 3, 1, 1, dtype=torch.bool), torch.device("cpu"))
    targets = Targets(cls, patch, patch[0])
    with pytest.raises(ValueError, match=r"6 masked patches for patch logits \[4, 64\]"):
        loss((cls, patch, torch.zeros(30, 64)), targets, patches, 0)
    assert not loss.center.any()


def test_centers_move_once_by_the_mean_of_all_batches(arrays):
    together, apart = build_loss(arrays, "k_small"), build_loss(arrays, "k_small")
    for loss, batches in ((together, 1), (apart, 3)):
        generator = torch.Generator().manual_seed(5)
        means = torch.randn(6, 128, generator=generator)
        loss.update_centers(list(means.view(batches, 6 // batches, 128).mean(dim=1)))
    torch.testing.assert_close(together.center, apart.center)
    torch.testing.assert_close(together.center2, apart.center2)
    assert together.center.any()
