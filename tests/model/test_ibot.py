"""Student, teacher and step: who learns from what, in which precision, over how many ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ibeton.model import ModelConfig, build, training_step
from ibeton.model.optim import build_optimizer

SMALL = {
    **{"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32},
    **{"hidden_dim": 48, "bottleneck_dim": 16, "out_dim": 64, "patch_out_dim": 64},
    **{"local_crops_number": 3, "epochs": 10, "warmup_teacher_temp_epochs": 2, "drop_path": 0.0},
}
RATES = {"epoch": 1, "lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9, "freeze_last_layer": 0}


def small_model(**options):
    torch.manual_seed(0)
    ibot = build(ModelConfig(**{**SMALL, **options}))
    with torch.no_grad():  # a teacher unlike its student, and a mask token that is not zero
        for parameter in ibot.student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return ibot


def random_batch(images=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    global_crops = torch.randn(2, images, 3, 32, 32, generator=generator)
    local_crops = torch.randn(3, images, 3, 16, 16, generator=generator)
    masks = torch.rand(2, images, 4, 4, generator=generator) < 0.3
    return global_crops, local_crops, masks


def step(ibot, batch, optimizer=None, scaler=None, **options):
    optimizer = optimizer or build_optimizer(ibot.student)
    return training_step(ibot, optimizer, scaler, *batch, **{**RATES, **options})


@pytest.fixture
def batch():
    return random_batch()


def test_teacher_starts_as_the_student_without_mask_token():
    ibot = build(ModelConfig(**SMALL))
    student, teacher = ibot.student.state_dict(), ibot.teacher.state_dict()
    assert set(student) - set(teacher) == {"backbone.masked_embed"}
    assert all(torch.equal(student[name], tensor) for name, tensor in teacher.items())


def test_shapes_of_the_logits_and_views_come_first(batch):
    global_crops, local_crops, masks = batch
    student = small_model().student
    cls, patch, local_cls = student(global_crops, local_crops, masks)
    assert [list(t.shape) for t in (cls, patch, local_cls)] == [[8, 64], [8, 16, 64], [12, 64]]
    second_view, _, second_local = student(global_crops[1:], local_crops[1:2], masks[1:])
    torch.testing.assert_close(cls[4:], second_view)
    torch.testing.assert_close(local_cls[4:8], second_local)
    assert student(global_crops, None, masks)[2] is None


def test_masks_change_the_student_and_are_not_for_the_teacher(batch):
    global_crops, _, masks = batch
    ibot = small_model()
    masked, unmasked = ibot.student(global_crops, None, masks), ibot.student(global_crops)
    assert not torch.allclose(masked[0], unmasked[0])
    with pytest.raises(ValueError, match="only a student"):
        ibot.teacher(global_crops, None, masks)


def test_gradients_reach_the_whole_student_and_no_teacher(batch):
    ibot = small_model()
    ibot(*batch, epoch=1)[0]["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in ibot.student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in ibot.teacher.parameters())


def test_teacher_is_the_moving_average_of_the_student():
    ibot = small_model()
    before = {name: p.clone() for name, p in ibot.teacher.named_parameters()}
    ibot.update_teacher(0.9)
    student = dict(ibot.student.named_parameters())
    for name, parameter in ibot.teacher.named_parameters():
        torch.testing.assert_close(parameter, 0.9 * before[name] + 0.1 * student[name])
        assert not torch.equal(parameter, before[name])
    last = {name: p.clone() for name, p in ibot.teacher.named_parameters()}
    ibot.update_teacher(1.0)
    assert all(torch.equal(last[name], p) for name, p in ibot.teacher.named_parameters())


def test_buffers_of_the_teacher_do_not_follow_the_student(batch):
    ibot = small_model(norm_in_head="bn")
    ibot.student(*batch)
    ibot.update_teacher(0.5)
    assert ibot.student.head.mlp[1].num_batches_tracked == 4  # two uses, two calls
    assert ibot.teacher.head.mlp[1].num_batches_tracked == 0


def test_student_without_local_views_trains(batch):
    ibot = small_model(local_crops_number=0)
    assert step(ibot, (batch[0], None, batch[2]))["finite"]


@pytest.mark.parametrize("norm", ["ln", "bn"])
@pytest.mark.parametrize("arch", [{"layer_scale": 0.1}, {"mean_pool": True}, {"drop_path": 0.5}])
def test_variants_learn_one_batch(batch, norm, arch):
    ibot = small_model(norm_in_head=norm, **arch)
    optimizer = build_optimizer(ibot.student)
    losses = [step(ibot, batch, optimizer, momentum=1.0, epoch=5)["loss"] for _ in range(12)]
    assert losses[-1] < losses[0]


def test_local_views_pass_batch_norm_with_all_their_tokens(batch):
    """Batch statistics run over class and patch tokens, so the class token cannot go alone."""
    student = small_model(norm_in_head="bn").student
    cls = student(*batch)[2]
    whole = student.head(student.backbone(batch[1].flatten(0, 1)))[0]
    torch.testing.assert_close(cls, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_float32(batch, dtype):
    full, half = small_model(), small_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if dtype is torch.float16 else None
    expected = step(full, batch)
    metrics = step(half, batch, scaler=scaler, autocast_dtype=dtype)
    assert metrics["finite"]
    assert metrics["loss"].dtype == torch.float32
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in half.parameters())
    error = 3e-2 if dtype is torch.bfloat16 else 4e-3  # a few roundings of the format
    for name in ("cls", "patch", "grad_norm"):
        assert metrics[name].item() == pytest.approx(expected[name].item(), rel=error)


def test_a_step_that_overflows_is_skipped_and_the_scale_halved(batch):
    ibot = small_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [p.clone() for p in ibot.student.parameters()]
    step(ibot, batch, scaler=scaler, autocast_dtype=torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(before, ibot.student.parameters(), strict=True))
    assert scaler.get_scale() == 2.0**39


def test_clipping_sees_gradients_without_the_loss_scale(batch):
    plain, scaled = small_model(), small_model()
    expected = step(plain, batch, clip_grad=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)  # a power of two is exact
    metrics = step(scaled, batch, scaler=scaler, clip_grad=0.1)
    assert expected["grad_norm"] > 0.1
    torch.testing.assert_close(metrics["grad_norm"], expected["grad_norm"])
    norms = [p.grad.norm() for p in scaled.student.parameters()]
    assert max(norms) == pytest.approx(0.1, rel=1e-4)


def test_a_loss_that_is_no_number_is_reported(batch):
    batch[0][0, 0, 0, 0, 0] = float("nan")
    assert not step(small_model(), batch)["finite"]


def test_float16_without_scaler_is_refused(batch):
    with pytest.raises(ValueError, match="float16 needs a GradScaler"):
        step(small_model(), batch, autocast_dtype=torch.float16)


def test_crops_and_masks_of_other_shapes_are_refused(batch):
    global_crops, local_crops, masks = batch
    ibot = small_model()
    with pytest.raises(ValueError, match=r"expected \[V, B, 3, S, S\]"):
        ibot.student(global_crops[0], local_crops, masks)
    with pytest.raises(ValueError, match=r"expected \[V, B, h, w\]"):
        ibot.student(global_crops, local_crops, masks[:1])
    with pytest.raises(ValueError, match="expected --local-crops-number 3"):
        ibot(global_crops, local_crops[:2], masks, 0)


def _train(ibot, batch):
    # SGD, not AdamW: the keys' biases have no gradient but rounding, which AdamW would blow up.
    optimizer = build_optimizer(ibot.student, "sgd")
    for _ in range(3):
        step(ibot, batch, optimizer)
    return ibot.state_dict()


def _ddp_rank(rank: int, folder: str, micro_steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    ibot = small_model(micro_steps=micro_steps)
    names = list(ibot.state_dict())
    ibot.wrap_ddp(torch.device("cpu"))
    assert list(ibot.state_dict()) == names  # the wrapper stays out of it
    mine = tuple(t[:, 2 * rank : 2 * rank + 2] for t in random_batch())
    torch.save(_train(ibot, mine), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("micro_steps", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_two_ranks_train_as_one_process_with_both_batches(tmp_path, batch, micro_steps):
    mp.spawn(_ddp_rank, args=(str(tmp_path), micro_steps), nprocs=2)
    alone = _train(small_model(), batch)
    ranks = [torch.load(tmp_path / f"rank{i}.pt") for i in range(2)]
    for name, tensor in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        error = (ranks[0][name] - tensor).norm()
        assert error <= 1e-5 * tensor.norm(), f"{name}: {error:.3g} of {tensor.norm():.3g}"


def test_batch_norm_over_ranks_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="--norm-in-head bn with several processes needs CUDA"):
        small_model(norm_in_head="bn").wrap_ddp(torch.device("cpu"))
