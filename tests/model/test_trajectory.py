"""Six whole training steps against the published trainer, in three settings.

A: shared head whose g trains, tight clipping, last layer frozen in the first epoch.
B: unshared student with a shared teacher, g fixed, no clipping, lambdas of 0.8 and 1.2.
C: shared head, g fixed, loose clipping, no masks in the first epoch.
"""

import functools

import numpy as np
import pytest
import torch

from ibeton.model import ModelConfig, build, training_step
from ibeton.model.kernels.launch import kernels_run_on
from ibeton.model.optim import build_optimizer
from ibeton.model.reference import forward_reference
from ibeton.model.schedules import cosine_schedule

STEPS_PER_EPOCH = 3
FORWARDED = (
    *("warmup_teacher_temp", "teacher_temp", "warmup_teacher_patch_temp", "teacher_patch_temp"),
    *("warmup_teacher_temp_epochs", "epochs", "embed_dim", "depth", "num_heads", "hidden_dim"),
    *("bottleneck_dim", "out_dim", "norm_last_layer", "shared_head", "shared_head_teacher"),
    *("lambda1", "lambda2", "pred_start_epoch"),
)


class Run:
    """The model as the reference started it, and its inputs and rates step by step."""

    def __init__(self, arrays, under, setting):
        prefix = f"{setting}/cfg/"
        cfg = {key[len(prefix) :]: v.item() for key, v in arrays.items() if key.startswith(prefix)}
        self.arrays, self.setting, self.cfg = arrays, setting, cfg
        config = ModelConfig(
            patch_size=8,
            image_size=64,
            drop_path=0.0,
            local_crops_number=cfg["nlcrops"],
            **{name: cfg[name] for name in FORWARDED},
        )
        self.ibot = build(config)
        self.ibot.student.load_state_dict(under(arrays, f"{setting}/init/student/"))
        self.ibot.copy_student_to_teacher()
        self.dtype = torch.float32
        self.optimizer = build_optimizer(self.ibot.student)
        peak = cfg["lr"] * cfg["batch_size"] / 256
        steps = (cfg["epochs"], STEPS_PER_EPOCH)
        self.lr = cosine_schedule(peak, cfg["min_lr"], *steps, cfg["warmup_epochs"])
        self.wd = cosine_schedule(cfg["weight_decay"], cfg["weight_decay_end"], *steps)
        self.momentum = cosine_schedule(cfg["momentum_teacher"], 1, *steps)

    def in_float64(self):
        self.ibot.double()
        self.dtype = torch.float64
        return self

    def inputs(self, i):
        epoch = i // STEPS_PER_EPOCH
        masks = torch.from_numpy(self.arrays[f"inputs/step{i}/masks"])
        if self.setting == "C" and epoch == 0:
            masks = torch.zeros_like(masks)
        elif self.setting == "C":
            masks = torch.from_numpy(self.arrays[f"inputs_C/step{i}/masks"])
        global_crops = torch.from_numpy(self.arrays[f"inputs/step{i}/global"])
        local_crops = torch.from_numpy(self.arrays[f"inputs/step{i}/local"])
        return global_crops.to(self.dtype), local_crops.to(self.dtype), masks

    def step(self, i):
        return training_step(
            self.ibot,
            self.optimizer,
            None,
            *self.inputs(i),
            epoch=i // STEPS_PER_EPOCH,
            lr=self.lr[i],
            weight_decay=self.wd[i],
            momentum=self.momentum[i],
            clip_grad=self.cfg["clip_grad"],
            freeze_last_layer=self.cfg["freeze_last_layer"],
        )


@pytest.fixture(params=["A", "B", "C"])
def setting(request):
    return request.param


@pytest.fixture(params=["fast", "reference", "checkpointed", "not_recomputed"])
def run(request, reference, under, setting):
    """The run on each path: all of them must give the published numbers."""
    run = Run(reference("trajectory"), under, setting)
    if request.param == "reference":
        run.ibot.forward = functools.partial(forward_reference, run.ibot)
    run.ibot.student.backbone.checkpoint_blocks = request.param == "checkpointed"
    for block in run.ibot.student.backbone.blocks:
        block.recompute = request.param != "not_recomputed"
    return run


def checksums(state):
    """[key, 4]: sum, sum of |x|, L2 norm, sum of x * cos(index), in float64."""
    rows = []
    for tensor in state.values():
        x = tensor.detach().double().flatten()
        index = torch.arange(len(x), dtype=torch.float64)
        rows.append([x.sum(), x.abs().sum(), x.norm(), (x * index.cos()).sum()])
    return np.array(rows)


def assert_checksums(state, expected, what, tolerance=1e-4):
    # Sums may cancel: all four are measured by the sum of |x|. What is all zero stays zero.
    size = np.maximum(expected[:, 1:2], 1e-6)
    error = np.abs(checksums(state) - expected) / size
    assert error.max() <= tolerance, f"{what}: {list(state)[error.max(1).argmax()]}"


def assert_tensors_near(state, expected, what):
    """Within 1e-4 by L2 norm. Not by the largest difference: AdamW turns a gradient as small as its
    epsilon, which is rounding, into a visible step (C has one such number)."""
    for name, tensor in expected.items():
        error, size = (state[name] - tensor).norm(), tensor.norm()
        assert error <= 1e-4 * size, f"{what} {name}: off by {error:.3g} of {size:.3g}"


def test_start(run, assert_near):
    arrays, setting, student = run.arrays, run.setting, run.ibot.student
    assert list(student.state_dict()) == list(arrays[f"{setting}/state_keys_student"])
    assert list(run.ibot.teacher.state_dict()) == list(arrays[f"{setting}/state_keys_teacher"])
    named = dict(student.named_parameters())
    assert list(named) == list(arrays[f"{setting}/param_names"])
    frozen = [name for name, p in named.items() if not p.requires_grad]
    assert (frozen or ["-"]) == list(arrays[f"{setting}/frozen"])
    names = {id(p): name for name, p in named.items()}
    groups = [[names[id(p)] for p in group["params"]] for group in run.optimizer.param_groups]
    assert groups[0] == list(arrays[f"{setting}/decayed"])
    assert groups[1] == list(arrays[f"{setting}/not_decayed"])
    for schedule, name in ((run.lr, "lr"), (run.wd, "wd"), (run.momentum, "momentum")):
        np.testing.assert_allclose(schedule, arrays[f"{setting}/{name}_schedule"], 1e-12)
    expected = arrays[f"{setting}/teacher_init_checksum"]
    np.testing.assert_allclose(checksums(run.ibot.teacher.state_dict()), expected, 1e-9, 1e-9)


def test_first_logits(run, assert_near):
    global_crops, local_crops, masks = run.inputs(0)
    cls, patch, local_cls = run.ibot.student(global_crops, local_crops, masks)
    teacher_cls, teacher_patch, _ = run.ibot.teacher(global_crops)
    prefix = f"{run.setting}/step0/logits_"
    assert_near(cls, run.arrays[prefix + "student_cls"])
    assert_near(patch[0], run.arrays[prefix + "student_patch_image0"])
    assert_near(local_cls, run.arrays[prefix + "student_local_cls"])
    assert_near(teacher_cls, run.arrays[prefix + "teacher_cls"])
    assert_near(teacher_patch[0], run.arrays[prefix + "teacher_patch_image0"])


def test_six_steps(run, under, assert_near):
    arrays, setting, ibot = run.arrays, run.setting, run.ibot
    accuracies = []
    for i in range(6):
        metrics = run.step(i)
        terms = np.array([metrics[name] for name in ("cls", "patch", "loss")])
        np.testing.assert_allclose(terms, arrays[f"{setting}/loss_terms"][i], 1e-4)
        assert metrics["finite"]
        accuracies.append(metrics["acc"])
        raw = arrays[f"{setting}/grad_norm_raw"][i]
        assert_near(metrics["grad_norm"], np.linalg.norm(raw[raw >= 0]), 1e-4)
        norms = [-1 if p.grad is None else p.grad.norm() for p in ibot.student.parameters()]
        clip = run.cfg["clip_grad"]
        # The kernels clip as they read the gradients, which they leave as they are.
        in_kernel = clip and kernels_run_on(next(ibot.parameters()))
        applied = [min(norm, clip) if in_kernel else norm for norm in norms]
        np.testing.assert_allclose(applied, arrays[f"{setting}/grad_norm_applied"][i], 1e-4)
        used = [
            group[name] for name in ("lr", "weight_decay") for group in run.optimizer.param_groups
        ]
        assert used == pytest.approx(list(arrays[f"{setting}/lr0_lr1_wd0_wd1_used"][i]), rel=1e-9)
        assert_near(ibot.loss.center[0], arrays[f"{setting}/centers"][i], 1e-4)
        assert_near(ibot.loss.center2[0, 0], arrays[f"{setting}/patch_centers"][i], 1e-4)
        for network in ("student", "teacher"):
            state = getattr(ibot, network).state_dict()
            expected = arrays[f"{setting}/{network}_checksum"][i]
            assert_checksums(state, expected, f"step {i} {network}")
            watched = under(arrays, f"{setting}/step{i}/{network}/")
            assert len(watched) == 7 - (network == "teacher")
            assert_tensors_near(state, watched, f"step {i} {network}")
    for epoch in range(2):
        mean = np.mean(accuracies[3 * epoch : 3 * epoch + 3])
        assert mean == pytest.approx(arrays[f"{setting}/epoch{epoch}_stats/acc"], rel=1e-6)
    assert_final_state(run, under, assert_near)


def test_six_steps_in_float64(run):
    arrays, setting, ibot = run.arrays, run.setting, run.in_float64().ibot
    for i in range(6):
        metrics = run.step(i)
        terms = np.array([metrics[name] for name in ("cls", "patch", "loss")])
        np.testing.assert_allclose(terms, arrays[f"{setting}/loss_terms_f64"][i], 1e-12)
        for network in ("student", "teacher"):
            state = getattr(ibot, network).state_dict()
            expected = arrays[f"{setting}/{network}_checksum_f64"][i]
            assert_checksums(state, expected, f"step {i} {network}", 1e-12)


def assert_final_state(run, under, assert_near):
    arrays, setting, ibot = run.arrays, run.setting, run.ibot
    for network in ("student", "teacher"):
        state = getattr(ibot, network).state_dict()
        final = under(arrays, f"{setting}/final/{network}/")
        # Only some settings store a network whole; its checksums above cover the others.
        assert_tensors_near(state, final, f"final {network}")
    named = dict(ibot.student.named_parameters())
    steps = [
        run.optimizer.state[p]["step"].item() if p in run.optimizer.state else 0
        for p in named.values()
    ]
    assert steps == list(arrays[f"{setting}/optimizer_state_step"])
    for moment in ("exp_avg", "exp_avg_sq"):
        for name, tensor in under(arrays, f"{setting}/final/adam_{moment}/").items():
            assert_near(run.optimizer.state[named[name]][moment], tensor, 1e-4, moment)


def test_first_step_changes_nothing_but_moments(run):
    before = {name: t.clone() for name, t in run.ibot.student.state_dict().items()}
    run.step(0)  # the warm-up starts at a learning rate of 0
    assert all(torch.equal(before[name], t) for name, t in run.ibot.student.state_dict().items())


@pytest.mark.slow
def test_200_steps_in_fp16_stay_with_fp32(reference, under):
    """Losses and weights, with loss scaling, from the published start and on its six batches."""
    runs = [Run(reference("trajectory"), under, "A") for _ in range(2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # no step overflows
    losses = []
    for run, dtype in zip(runs, (None, torch.float16), strict=True):
        rates = {"lr": 5e-4, "weight_decay": 0.1, "momentum": 0.99, "clip_grad": 0.05}
        metrics = [
            training_step(
                run.ibot, run.optimizer, scaler if dtype else None, *run.inputs(i % 6),
                epoch=i // 60, **rates, autocast_dtype=dtype,
            )
            for i in range(200)
        ]  # fmt: skip
        losses.append(torch.stack([m["loss"] for m in metrics]))
        assert all(m["finite"] for m in metrics)
    assert scaler.get_scale() == 2.0**10
    full, half = runs
    # Single steps wander by a few roundings of fp16 (2^-11); their mean must not.
    torch.testing.assert_close(losses[1], losses[0], rtol=5e-3, atol=0)
    torch.testing.assert_close(losses[1].mean(), losses[0].mean(), rtol=5e-4, atol=0)
    moments = [state[key] for state in half.optimizer.state.values() for key in state]
    assert {t.dtype for t in (*half.ibot.state_dict().values(), *moments)} == {torch.float32}
    for name, tensor in full.ibot.state_dict().items():
        error = (half.ibot.state_dict()[name] - tensor).norm()
        assert error <= 2e-2 * tensor.norm(), f"{name}: {error:.3g} of {tensor.norm():.3g}"
