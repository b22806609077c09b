"""The step as a CUDA graph: inputs, padding, draws, and keys on the CPU; the graphs on a GPU."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from ibeton.model import ModelConfig, build, training_step
from ibeton.model.backbones.blocks import draw_kept
from ibeton.model.cuda_graph import GraphedStep, obstacle
from ibeton.model.host_inputs import HostInputs, from_host
from ibeton.model.kernels.launch import counting
from ibeton.model.masking import bucket_size, masked_patches
from ibeton.model.optim import (
    AdamW,
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    parameter_groups,
)
from ibeton.model.steps import Step, set_rates

CPU = torch.device("cpu")
SMALL = {
    **{"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32},
    **{"hidden_dim": 48, "bottleneck_dim": 16, "out_dim": 64, "patch_out_dim": 64},
    **{"local_crops_number": 3, "epochs": 10, "warmup_teacher_temp_epochs": 2, "drop_path": 0.2},
}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def small_model(**options):
    torch.manual_seed(0)
    return build(ModelConfig(**{**SMALL, **options}))


def batch_of(step, images=8, share=0.3):
    """Another number of masked patches in every step."""
    generator = torch.Generator().manual_seed(step)
    global_crops = torch.randn(2, images, 3, 32, 32, generator=generator)
    local_crops = torch.randn(3, images, 3, 16, 16, generator=generator)
    masks = torch.rand(2, images, 4, 4, generator=generator) < share
    return global_crops, local_crops, masks


def rates_of(step):
    """Every rate changes from step to step; the epoch too, every other step."""
    rates = {"lr": 1e-3 * (1 + step), "weight_decay": 0.04 + 0.01 * step}
    return {"epoch": step // 2, **rates, "momentum": 0.9 + 0.001 * step}


def state_of(ibot, optimizer, scaler=None):
    moments = [t for state in optimizer.state.values() for t in state.values()]
    scale = [torch.tensor(scaler.get_scale())] if scaler is not None else []
    return [t.detach().clone() for t in (*ibot.state_dict().values(), *moments, *scale)]


def assert_same(one, other):
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def growing_scaler():
    """Overflows now and then: it starts too high, and grows after two good steps."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**122, growth_interval=2)


@pytest.mark.parametrize("options", [{}, {"mean_pool": True}, {"norm_in_head": "ln"}])
def test_what_padding_rows_hold_does_not_change_a_bit(options):
    """Without stochastic depth, which on a CPU changes the number of rows."""
    ibot, (*crops, masks) = small_model(drop_path=0.0, **options), batch_of(0)
    exact, results = masked_patches(masks, CPU), []
    count, rows = len(exact.places), masks.numel()
    for seed in range(4):
        padded = masked_patches(masks, CPU, rows)
        if seed:
            generator = torch.Generator().manual_seed(seed)
            padded.places[count:] = torch.randint(rows, (rows - count,), generator=generator)
        results.append(loss_and_gradients(ibot, crops, masks, padded))
    for other in results[1:]:
        assert_same(results[0], other)


class SixteenRows(TorchDispatchMode):
    """Every matrix product takes 16 rows at a time, filled up with zeros, and sums over rows go row
    by row. A library may choose another order of its sums for another number of rows."""

    def __init__(self):
        super().__init__()
        self.changed = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, aten = function.overloadpacket, torch.ops.aten
        if name == aten.sum and (len(args) == 1 or list(args[1]) == [0]) and not kwargs:
            self.changed.add("sum over rows")
            out = sum(args[0].unbind())
            return out.unsqueeze(0) if len(args) > 2 and args[2] else out
        if name not in (aten.mm, aten.addmm):
            return function(*args, **(kwargs or {}))
        *bias, a, b = args
        if a.stride(0) == 1 != a.stride(1):  # of a.T @ b: the rows are added up
            self.changed.add("product over rows")
            parts = zip(in_groups(a.t()), in_groups(b), strict=True)
            return sum(function(*bias, one.t(), other) for one, other in parts)
        self.changed.add("product")
        return torch.cat([function(*bias, some, b) for some in in_groups(a)])[: len(a)]


def in_groups(rows):
    return torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % 16)).split(16)


@pytest.mark.parametrize("options", [{}, {"mean_pool": True}, {"norm_in_head": "ln"}])
@pytest.mark.parametrize("images", [3, 8])
def test_the_number_of_padding_rows_does_not_change_a_bit(options, images):
    """If libraries add up in one order for any number of rows. So padding changes nothing but that
    order. Widths are multiples of 32, so that vector instructions take whole rows. Without
    stochastic depth, which on a CPU changes the number of rows."""
    sizes = {"hidden_dim": 64, "bottleneck_dim": 32, "drop_path": 0.0}
    ibot, (*crops, masks) = small_model(**sizes, **options), batch_of(images, images)
    exact = masked_patches(masks, CPU)
    with SixteenRows() as mode:
        expected = loss_and_gradients(ibot, crops, masks, exact)
        for more in (1, 7, 64, masks.numel()):
            padded = masked_patches(masks, CPU, len(exact.places) + more)
            assert_same(expected, loss_and_gradients(ibot, crops, masks, padded))
    assert mode.changed == {"product", "product over rows", "sum over rows"}


@pytest.mark.parametrize("more", [0, 1, 7, 64])
def test_the_number_of_padding_rows_changes_only_the_order_of_sums(more):
    """With the library's own sums, in float64: equal to 1e-13."""
    ibot, (*crops, masks) = small_model().double(), batch_of(0)
    crops, exact = [crop.double() for crop in crops], masked_patches(masks, CPU)
    expected = loss_and_gradients(ibot, crops, masks, exact)
    padded = masked_patches(masks, CPU, len(exact.places) + more)
    for one, other in zip(expected, loss_and_gradients(ibot, crops, masks, padded), strict=True):
        assert (one - other).norm() <= 1e-13 * one.norm()


def loss_and_gradients(ibot, crops, masks, patches):
    torch.manual_seed(1)
    ibot.zero_grad()
    terms, means = ibot(*crops, masks, 0, patches)
    terms["loss"].backward()
    gradients = [p.grad.clone() for p in ibot.student.parameters()]
    return [*(term.detach() for term in terms.values()), means, *gradients]


def test_buckets_hold_the_fullest_part_and_are_few():
    sizes = set()
    for step in range(50):
        masks = batch_of(step)[2]
        for parts in (1, 2, 4):
            size = bucket_size(masks, parts)
            fullest = max(int(part.sum()) for part in masks.chunk(parts, dim=1))
            assert fullest <= size < fullest + masks.numel() / parts / 32 + 1
            sizes.add((parts, size))
    assert len(sizes) < 40
    assert bucket_size(torch.zeros(2, 8, 4, 4, dtype=torch.bool)) == 8
    with pytest.raises(ValueError, match="do not fit in 3 rows"):
        masked_patches(batch_of(0)[2], CPU, 3)


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_steps_on_static_inputs_are_eager_steps_bit_for_bit(micro_steps):
    """Over epochs without and with masks and with the last layer frozen first, with draws,
    overflows, an image that is NaN, and a checkpoint loaded on the way."""
    eager = small_model(micro_steps=micro_steps)
    graphed, scalers = copy.deepcopy(eager), [growing_scaler(), growing_scaler()]
    optimizers = [build_optimizer(eager.student), build_optimizer(graphed.student)]
    plain = Step(eager, optimizers[0], scalers[0], padded=True)
    replayed = GraphedStep(Step(graphed, optimizers[1], scalers[1]))
    saved, finite = None, []
    for step in range(14):
        batch = batch_of(step % 5, share=0.0 if step < 3 else 0.3)
        if step == 9:
            batch[0][0, 1, 0] = float("nan")
        torch.manual_seed(step)
        rates = rates_of(step)
        expected = plain.run(plain.inputs(*batch, **rates), rates["epoch"])
        torch.manual_seed(step)
        metrics = replayed(*batch, **rates)
        for name, value in expected.items():  # NaN is equal to NaN
            torch.testing.assert_close(metrics[name], value, rtol=0, atol=0, equal_nan=True)
        assert_same(
            state_of(eager, optimizers[0], scalers[0]), state_of(graphed, optimizers[1], scalers[1])
        )
        finite.append(bool(metrics["finite"]))
        if step == 5:
            saved = copy.deepcopy(optimizer_state(optimizers[1])), state_of(graphed, optimizers[1])
        if step == 11:  # as a rollback does
            for optimizer in optimizers:
                load_optimizer_state(optimizer, copy.deepcopy(saved[0]))
    assert not finite[9]
    assert 3 <= finite.count(False) <= 9
    assert {group["lr"] for group in optimizers[1].param_groups} == {rates_of(13)["lr"]}


def test_shapes_and_frozen_prototypes_have_graphs_of_their_own():
    ibot = small_model()
    step = GraphedStep(Step(ibot, build_optimizer(ibot.student), None))
    ran = []
    for i, (share, epoch, images) in enumerate(
        [
            *((0.0, 0, 8), (0.0, 0, 8), (0.0, 0, 8)),  # eager, recorded, replayed
            *((0.0, 1, 8), (0.0, 2, 8)),  # no longer frozen; another epoch alone is nothing new
            *((0.5, 2, 8), (0.5, 3, 8)),  # another bucket
            *((0.0, 3, 8), (0.0, 3, 4)),  # one that is known, another batch size
        ]
    ):
        before = len(step._seen), len(step._recordings)
        step(*batch_of(1, images, share), **{**rates_of(i), "epoch": epoch})
        ran.append((len(step._seen) - before[0], len(step._recordings) - before[1]))
    eager, recorded, replayed = (1, 0), (0, 1), (0, 0)
    first = [eager, recorded, replayed, eager, recorded, eager, recorded, replayed, eager]
    assert ran == first
    assert len({id(r.inputs.global_crops) for r in step._recordings.values()}) == 1, "one buffer"


def test_draws_are_those_of_eager_steps_and_new_in_every_replay():
    draws, seen = HostInputs(), []

    def function():
        one = from_host(lambda: torch.rand(3), CPU)
        return one, from_host(lambda: torch.rand(2), CPU)

    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        if seen:
            draws.refill()
        with draws.repeating() if seen else draws.recording():
            one, other = function()
        seen.append((one.data_ptr(), other.data_ptr()))
        torch.manual_seed(seed)
        assert_same([one, other], [torch.rand(3), torch.rand(2)])
    assert len(set(seen)) == 1, "the tensors stay in place"
    torch.manual_seed(3)
    assert_same(function(), [one, other])


def test_a_capture_finds_the_tensors_of_the_step_before_it():
    """New ones would lie in the graph's memory, which holds other values before them."""
    draws = HostInputs()
    with pytest.raises(RuntimeError, match="the eager step"), draws.recording(captures=True):
        from_host(lambda: torch.ones(2), CPU)
    with draws.recording():
        eager = from_host(lambda: torch.ones(2), CPU)
    with draws.recording(captures=True):
        captured = from_host(lambda: torch.full((2,), 3.0), CPU)
        assert captured.tolist() == [1, 1], "the copy is not part of the capture"
    assert captured is eager
    assert captured.tolist() == [3, 3]
    with pytest.raises(RuntimeError, match="the eager step"), draws.recording(captures=True):
        from_host(lambda: torch.ones(3), CPU)


def test_stochastic_depth_off_the_cpu_keeps_the_samples_that_it_keeps_on_it(monkeypatch):
    """The factors of a device, computed from the same draws as the CPU's gathered tokens."""
    rates, shapes = [0.0, 0.3, 0.6], [(5, 4), (3, 2)]
    torch.manual_seed(0)
    gathered = draw_kept(rates, shapes, CPU)
    values = []
    monkeypatch.setattr(
        "ibeton.model.backbones.blocks.from_host",
        lambda make, _: values.append(make()) or values[0],
    )
    torch.manual_seed(0)
    spread = draw_kept(rates, shapes, torch.device("meta"))
    assert gathered[0] is None
    assert spread[0] is None
    for on_cpu, elsewhere in zip(gathered[1:], spread[1:], strict=True):
        assert elsewhere.factor.flatten().nonzero().flatten().tolist() == on_cpu.tokens.tolist()
        kept = elsewhere.factor.flatten()[on_cpu.tokens]
        assert kept.tolist() == pytest.approx([on_cpu.scale] * len(kept))


class DeviceOnly(TorchDispatchMode):
    """Fails at what a CUDA graph cannot hold: a copy from the host, or a value given to it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = torch.utils._pytree.tree_leaves((args, kwargs))
        off = [t for t in tensors if isinstance(t, torch.Tensor) and t.device.type != "meta"]
        assert not off, f"{function} reads a tensor of the host: {off[0]}"
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs)


class Scaler(torch.amp.GradScaler):
    """A GradScaler of the meta device, which PyTorch has none for. It cannot see whether a gradient
    is finite: `found_inf` is always a tensor, as on a GPU."""

    def __init__(self):
        super().__init__("cpu", enabled=True)
        self._scale = torch.ones((), device="meta")
        self._growth_tracker = torch.zeros((), dtype=torch.int32, device="meta")

    def scale(self, outputs):
        return outputs * self._scale


@pytest.mark.parametrize(
    ("options", "scaled", "epoch"),
    [
        ({}, True, 1),
        ({"micro_steps": 2, "checkpoint_blocks": True}, False, 0),  # frozen last layer
    ],
)
def test_a_whole_step_never_touches_the_host(options, scaled, epoch, monkeypatch):
    """On meta tensors, which take the path of a GPU without one, Triton's launches included: no
    copy from or to the host, and no value that it waits for."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta has none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    with torch.device("meta"):
        ibot = build(ModelConfig(**{**SMALL, **options}))
    optimizer = AdamW(parameter_groups(ibot.student), lr=0.0, weight_decay=0.0)
    step = Step(ibot, optimizer, Scaler() if scaled else None, padded=True)
    inputs = step.inputs(*batch_of(0), **rates_of(0)).on(torch.device("meta"), with_rates=True)
    draws, launches = HostInputs(), []
    with counting(lambda launch: launches.append(launch.name)):
        with draws.recording():
            step.run(inputs, epoch)  # draws, which the second run finds in place
        with draws.repeating(), DeviceOnly():
            metrics = step.run(inputs, epoch)
    assert "_update_kernel" in launches
    assert {"loss", "grad_norm", "finite"} < set(metrics)
    assert all(metric.device.type == "meta" for metric in metrics.values())


def test_the_optimizer_allows_captures_under_the_name_that_pytorch_has():
    names = [name for name in vars(torch.optim.Optimizer) if "capture_health_check" in name]
    assert names
    assert all(name in vars(AdamW) for name in names)


def test_rates_on_the_device_are_those_of_the_host():
    """Learning rate and decay to the rounding of float32; temperatures and momentum as well."""
    one, other = (torch.nn.Linear(64, 64) for _ in range(2))
    other.load_state_dict(one.state_dict())
    optimizers = [build_optimizer(module) for module in (one, other)]
    assert all(isinstance(optimizer, AdamW) for optimizer in optimizers)
    for i in range(20):
        lr, decay = 1e-3 * (1 + i), 0.04 + 0.01 * i
        set_rates(optimizers[0], lr, decay)
        set_rates(optimizers[1], *torch.tensor([lr, decay], dtype=torch.float64))
        for module, optimizer in zip((one, other), optimizers, strict=True):
            torch.manual_seed(i)
            for parameter in module.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(one.bias, other.bias, rtol=1e-6, atol=1e-7)
    models = [small_model(), small_model()]
    momenta = (0.996, torch.tensor(0.996, dtype=torch.float64))
    for model, momentum in zip(models, momenta, strict=True):
        with torch.no_grad():
            model.student.backbone.cls_token.add_(1)
        model.update_teacher(momentum)
    for name, tensor in models[0].teacher.state_dict().items():
        torch.testing.assert_close(models[1].teacher.state_dict()[name], tensor)


def test_temperatures_may_come_as_a_tensor():
    ibot, batch = small_model(drop_path=0.0), batch_of(0)
    for epoch in (0, 5):
        temps = torch.tensor(ibot.loss.temperatures(epoch), dtype=torch.float64)
        expected, _ = ibot(*batch, epoch)
        terms, _ = ibot(*batch, 9, None, temps)
        assert all(torch.equal(terms[name], expected[name]) for name in expected)


def test_skipping_on_the_device_is_what_a_grad_scaler_does_on_the_host():
    """Against PyTorch's own unfused AdamW, which the scaler steps or not, over random overflows."""
    fused, plain = (torch.nn.Linear(16, 16) for _ in range(2))
    plain.load_state_dict(fused.state_dict())
    groups = [{"params": [plain.weight]}, {"params": [plain.bias], "weight_decay": 0.0}]
    optimizers = [build_optimizer(fused), torch.optim.AdamW(groups, lr=0.0, foreach=False)]
    scalers = [torch.amp.GradScaler("cpu", 2.0**16, growth_interval=3) for _ in range(2)]
    generator, overflows = torch.Generator().manual_seed(0), 0
    for i in range(40):
        overflow = torch.rand((), generator=generator) < 0.3
        overflows += int(overflow)
        rates = torch.tensor([1e-3 * (1 + i), 0.1], dtype=torch.float64)
        set_rates(optimizers[0], *rates)
        set_rates(optimizers[1], *rates.tolist())
        for module, optimizer, scaler in zip((fused, plain), optimizers, scalers, strict=True):
            torch.manual_seed(i)
            scaler.scale(torch.zeros(()))
            for parameter in module.parameters():
                parameter.grad = torch.randn_like(parameter) * scaler.get_scale()
            if overflow:
                module.bias.grad[i % 16] = float("inf") if i % 2 else float("nan")
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert 5 < overflows < 35
    assert scalers[0].state_dict() == scalers[1].state_dict()
    torch.testing.assert_close(fused.weight, plain.weight, rtol=1e-5, atol=1e-6)
    steps = [
        int(o.state[m.weight]["step"]) for m, o in zip((fused, plain), optimizers, strict=True)
    ]
    assert steps == [40 - overflows] * 2


@pytest.mark.parametrize(
    ("options", "device", "words"),
    [
        ({}, "cpu", "need a GPU"),
        ({"arch": "swin_t7", "patch_size": 32}, "cuda", "--arch swin_t7"),
        ({}, "cuda", ""),
    ],
)
def test_what_stands_in_the_way_of_graphs_is_said(options, device, words):
    optimizer = build_optimizer(torch.nn.Linear(2, 2))
    said = obstacle(ModelConfig(**options), optimizer, torch.device(device))
    assert (words in said) if words else not said
    assert "adamw" in obstacle(
        ModelConfig(), torch.optim.SGD([torch.zeros(1)]), torch.device("cuda")
    )


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ibot = small_model(drop_path=0.0)
    step = GraphedStep(Step(ibot, build_optimizer(ibot.student), None))
    for i in range(5):
        crops = [tensor[:, 4 * rank : 4 * rank + 4] for tensor in batch_of(i)]
        metrics = step(*crops, **{**rates_of(0), "epoch": 1})
    assert len(step._recordings) > 0
    torch.save((ibot.state_dict(), metrics["grad_norm"]), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_reduce_between_two_graphs_as_one_process_with_both_batches(tmp_path):
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    alone = small_model(drop_path=0.0)
    optimizer = build_optimizer(alone.student)
    for i in range(5):
        metrics = training_step(alone, optimizer, None, *batch_of(i), **{**rates_of(0), "epoch": 1})
    ranks = [torch.load(tmp_path / f"rank{i}.pt") for i in range(2)]
    assert ranks[0][1].item() == pytest.approx(metrics["grad_norm"].item(), rel=1e-4)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(ranks[0][0][name], ranks[1][0][name]), name
        assert (ranks[0][0][name] - tensor).norm() <= 1e-3 * tensor.norm() + 1e-3, name


@pytest.fixture
def deterministic():
    """Kernels that add up in a fixed order, where PyTorch has them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.usefixtures("deterministic")
def test_graphs_are_eager_steps_bit_for_bit_on_a_gpu(precision):
    """20 steps with overflows, an image that is NaN, and a checkpoint loaded on the way. Local
    views have the size of global ones: the gradient of an interpolated position table is added up
    in an order that varies on a GPU."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16")
    eager = small_model().cuda()
    graphed = copy.deepcopy(eager)
    scalers = [None, None]
    if dtype is torch.float16:
        scalers = [torch.amp.GradScaler("cuda", 2.0**20, growth_interval=3) for _ in range(2)]
    optimizers = [build_optimizer(ibot.student) for ibot in (eager, graphed)]
    settings = {"autocast_dtype": dtype}
    replayed = GraphedStep(Step(graphed, optimizers[1], scalers[1], **settings), required=True)
    most = 0
    for step in range(20):
        global_crops, _, masks = batch_of(step % 4)
        crops = [global_crops, global_crops[:1].repeat(3, 1, 1, 1, 1)]
        if step == 11:
            crops[0][0, 1, 0] = float("nan")
        batch = (*(crop.cuda() for crop in crops), masks)
        torch.manual_seed(step)
        training_step(eager, optimizers[0], scalers[0], *batch, **rates_of(step), **settings)
        torch.manual_seed(step)
        replayed(*batch, **rates_of(step))
        assert_same(
            state_of(eager, optimizers[0], scalers[0]), state_of(graphed, optimizers[1], scalers[1])
        )
        most = max(most, len(replayed._recordings))
        if step == 13:
            for optimizer in optimizers:
                load_optimizer_state(optimizer, copy.deepcopy(optimizer_state(optimizer)))
    assert most > 1
