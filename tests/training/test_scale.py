"""One run on any number of processes: shares of the batch, gradients, state of the optimizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from ibeton.model import IBOT, ModelConfig, build, training_step
from ibeton.model.optim import build_optimizer, load_optimizer_state, optimizer_state
from ibeton.training.config import Config, from_values

STEPS, IMAGES = 4, 4
BACKBONE: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
HEAD: dict[str, Any] = {"hidden_dim": 48, "bottleneck_dim": 16, "out_dim": 64, "patch_out_dim": 64}


def small_model(micro_steps: int = 1, **options: Any) -> IBOT:
    torch.manual_seed(0)
    crops = {"image_size": 32, "local_crops_number": 2, "epochs": 10}
    rest = {"warmup_teacher_temp_epochs": 2, "drop_path": 0.0, "micro_steps": micro_steps}
    return build(ModelConfig(**{**BACKBONE, **HEAD, **crops, **rest, **options}))


def batch_of(step: int, rank: int, ranks: int) -> tuple[torch.Tensor, ...]:
    """The part of `rank`; nothing is masked in the first step."""
    generator = torch.Generator().manual_seed(step)
    global_crops = torch.randn(2, IMAGES, 3, 32, 32, generator=generator)
    local_crops = torch.randn(2, IMAGES, 3, 16, 16, generator=generator)
    masks = torch.rand(2, IMAGES, 4, 4, generator=generator) < (0.3 if step else 0.0)
    part = slice(rank * IMAGES // ranks, (rank + 1) * IMAGES // ranks)
    return global_crops[:, part], local_crops[:, part], masks[:, part]


def advance(ibot: IBOT, optimizer: torch.optim.Optimizer, steps: range, rank: int, n: int) -> None:
    rates = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.9}
    for step in steps:
        epoch = 0 if step == 0 else 1  # the prototypes stand still in the first step
        batch = batch_of(step, rank, n)
        training_step(ibot, optimizer, None, *batch, epoch=epoch, **rates)


def numbers_in(optimizer: torch.optim.Optimizer) -> int:
    """Elements of the state that this process holds."""
    inner = getattr(optimizer, "optim", optimizer)
    states = [*inner.state.values(), *(optimizer.state.values() if inner is not optimizer else [])]
    return sum(t.numel() for state in states for t in state.values() if t.dim() > 0)


def _compare(rank: int, folder: Path, name: str, goes_on: bool) -> None:
    """Unsharded and sharded, from the beginning or from FOLDER/start-NAME.pt."""
    found: dict[bool, dict[str, Any]] = {}
    for sharded in (False, True):
        ibot = small_model()
        optimizer = build_optimizer(ibot.student, name, sharded)
        if goes_on:
            saved = torch.load(folder / f"start-{name}.pt")
            ibot.load_state_dict(saved["ibot"])
            load_optimizer_state(optimizer, saved["optimizer"])
        ibot.wrap_ddp(torch.device("cpu"))
        advance(ibot, optimizer, range(STEPS // 2 if goes_on else 0, STEPS), rank, 2)
        state = optimizer_state(optimizer)
        assert (state is None) == (sharded and rank > 0)
        found[sharded] = {"ibot": ibot.state_dict(), "optimizer": state}
        found[sharded]["held"] = numbers_in(optimizer)
    torch.save(found, folder / f"{name}-{goes_on}-{rank}.pt")


def _graph(rank: int, folder: Path, micro_steps: int) -> None:
    ibot = small_model(micro_steps, drop_path=0.3, depth=4, shared_head=False)
    ibot.wrap_ddp(torch.device("cpu"))
    wrapper: Any = ibot.student_call
    assert isinstance(wrapper, DistributedDataParallel)
    assert wrapper.static_graph == (micro_steps == 1)
    optimizer = build_optimizer(ibot.student)
    torch.manual_seed(rank)  # each drops other paths
    advance(ibot, optimizer, range(STEPS), rank, 2)
    assert all(p.grad is not None for p in ibot.student.parameters() if p.requires_grad)
    torch.save(ibot.state_dict(), folder / f"graph-{micro_steps}-{rank}.pt")


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    for name, goes_on in [("adamw", False), ("sgd", False), ("lars", False)]:
        _compare(rank, folder, name, goes_on)
    for name in ("adamw", "sgd"):
        _compare(rank, folder, name, goes_on=True)
    for micro_steps in (1, 2):
        _graph(rank, folder, micro_steps)
    dist.destroy_process_group()


def alone_half_way(name: str) -> tuple[IBOT, torch.optim.Optimizer]:
    """What one process has after half of the steps."""
    ibot = small_model()
    optimizer = build_optimizer(ibot.student, name)
    advance(ibot, optimizer, range(STEPS // 2), 0, 1)
    return ibot, optimizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left, see `_rank`."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("adamw", "sgd"):
        ibot, optimizer = alone_half_way(name)
        start = {"ibot": ibot.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(start, folder / f"start-{name}.pt")
    mp.spawn(_rank, args=(folder,), nprocs=2)
    return folder


def left(folder: Path, name: str, goes_on: bool = False) -> list[dict[bool, dict[str, Any]]]:
    """By rank, then by whether it was sharded."""
    return [torch.load(folder / f"{name}-{goes_on}-{rank}.pt") for rank in range(2)]


def assert_same(one: Any, other: Any, tolerance: float) -> None:
    """Nested states, tensor by tensor, to `tolerance` of the largest element."""
    if isinstance(one, torch.Tensor):
        error = (one.double() - other.double()).abs().max()
        assert error <= tolerance * one.double().abs().max()
    else:
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name], tolerance)


@pytest.mark.parametrize(
    ("name", "goes_on"),
    [("adamw", False), ("sgd", False), ("lars", False), ("adamw", True), ("sgd", True)],
)
def test_a_sharded_run_equals_the_unsharded_one_and_each_rank_holds_half(
    folder: Path, name: str, goes_on: bool
) -> None:
    ranks = left(folder, name, goes_on)
    for rank in ranks:
        assert_same(rank[True]["ibot"], rank[False]["ibot"], 1e-6)
    whole, parts = ranks[0][False]["held"], [rank[True]["held"] for rank in ranks]
    assert sum(parts) == whole > 0
    assert max(parts) < 0.55 * whole


def test_the_saved_state_of_a_sharded_optimizer_is_that_of_an_unsharded_one(folder: Path) -> None:
    first = left(folder, "adamw")[0]
    plain, sharded = first[False]["optimizer"], first[True]["optimizer"]
    assert_same(plain["state"], sharded["state"], 1e-6)
    groups = zip(plain["param_groups"], sharded["param_groups"], strict=True)
    assert all(one["params"] == other["params"] for one, other in groups)


def test_a_run_goes_on_sharded_over_two_ranks_and_then_on_one(folder: Path) -> None:
    # SGD, as AdamW blows up the rounding of a sum over other ranks.
    alone, optimizer = alone_half_way("sgd")
    advance(alone, optimizer, range(STEPS // 2, STEPS), 0, 1)
    saved = left(folder, "sgd", goes_on=True)[0][True]
    assert_same(alone.state_dict(), saved["ibot"], 1e-5)
    back = small_model()
    back.load_state_dict(saved["ibot"])
    continued = build_optimizer(back.student, "sgd")
    load_optimizer_state(continued, saved["optimizer"])
    for ibot, its in ((alone, optimizer), (back, continued)):
        advance(ibot, its, range(STEPS, STEPS + 2), 0, 1)
    assert_same(alone.state_dict(), back.state_dict(), 1e-5)


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_masks_and_dropped_paths_leave_the_graph_as_ddp_saw_it(
    folder: Path, micro_steps: int
) -> None:
    one, other = (torch.load(folder / f"graph-{micro_steps}-{rank}.pt") for rank in range(2))
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def config_of(**values: Any) -> Config:
    return from_values({"data": "photos.beton", **values})


@pytest.mark.parametrize("ranks", [1, 2, 8, 16])
def test_a_global_batch_is_the_same_run_on_any_number_of_processes(ranks: int) -> None:
    config = config_of(global_batch_size=1024)
    config.share_batch(ranks)
    assert config.pipeline.batch_size * ranks == 1024


def test_a_global_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="--global-batch-size 1024 cannot be shared by 3 proc"):
        config_of(global_batch_size=1024).share_batch(3)


def test_micro_steps_must_divide_the_part_of_a_process() -> None:
    config = config_of(global_batch_size=1024, micro_steps=16)
    config.share_batch(8)
    with pytest.raises(ValueError, match=r"--micro-steps 48 does not divide .* 128, the part of"):
        config_of(global_batch_size=1024, micro_steps=48).share_batch(8)


def test_both_kinds_of_batch_size_are_refused() -> None:
    with pytest.raises(ValueError, match="--batch-size and --global-batch-size: give one of them"):
        config_of(global_batch_size=1024, batch_size=64)
