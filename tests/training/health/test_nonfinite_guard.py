"""Steps whose loss or gradients are no numbers: nothing of them stays, and too many are told."""

import copy
from typing import Any

import pytest
import torch

from ibeton.model import IBOT, build, training_step
from ibeton.model.config import ModelConfig
from ibeton.model.optim import build_optimizer
from ibeton.training.health.collapse import CollapseAlarm, spread
from ibeton.training.health.nonfinite_guard import IN_A_ROW, OVERFLOWS_IN_A_ROW, NonFiniteGuard

NAN, INF = float("nan"), float("inf")
RATES = {"epoch": 1, "lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9}


def small_model(**options: Any) -> IBOT:
    torch.manual_seed(0)
    shape = {"arch": "vit_t", "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
    head = {"image_size": 16, "out_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8}
    crops = {"local_crops_number": 1, "epochs": 4, "warmup_teacher_temp_epochs": 1}
    return build(ModelConfig(**{**shape, **head, **crops, "drop_path": 0.0, **options}))


def batch() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(2, 4, 2, 2, generator=generator) < 0.5
    masks[:, 0, 0, 0] = True
    crops = (torch.randn(2, 4, 3, 16, 16, generator=generator),)
    return [*crops, torch.randn(1, 4, 3, 8, 8, generator=generator), masks]


def everything(ibot: IBOT, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All tensors that a step changes."""
    state = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
    return copy.deepcopy([*ibot.state_dict().values(), *state])


def spoil_image(ibot: IBOT, crops: list[torch.Tensor]) -> None:
    crops[0][1, 2, 0, 3, 3] = NAN


def spoil_gradient(ibot: IBOT, crops: list[torch.Tensor]) -> None:
    weight = ibot.student.backbone.blocks[0].mlp.fc1.weight  # type: ignore[union-attr, index]
    weight.register_hook(lambda gradient: gradient * NAN)


def spoil_loss(ibot: IBOT, crops: list[torch.Tensor]) -> None:
    """An infinite loss with finite gradients: only the loss itself can tell."""
    compute = ibot.loss.forward

    def infinite(*arguments: Any) -> Any:
        terms, means = compute(*arguments)
        return terms | {"loss": terms["loss"] + INF}, means

    ibot.loss.forward = infinite  # type: ignore[method-assign]


@pytest.mark.parametrize("spoil", [spoil_image, spoil_gradient, spoil_loss])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw", {}),
        ("sgd", {}),
        ("lars", {}),
        ("adamw", {"norm_in_head": "bn"}),
        ("adamw", {"micro_steps": 2}),
    ],
)
def test_a_bad_step_changes_nothing(name: str, options: dict[str, Any], spoil: Any) -> None:
    ibot = small_model(**options)
    optimizer = build_optimizer(ibot.student, name)
    good = training_step(ibot, optimizer, None, *batch(), **RATES)
    assert good["finite"]
    before, crops = everything(ibot, optimizer), batch()
    spoil(ibot, crops)
    assert not training_step(ibot, optimizer, None, *crops, **RATES)["finite"]
    after = everything(ibot, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_bad_first_step_leaves_a_run_as_if_it_had_not_been() -> None:
    runs = []
    for spoiled in (False, True):
        ibot = small_model()
        optimizer = build_optimizer(ibot.student)
        if spoiled:
            crops = batch()
            spoil_image(ibot, crops)
            training_step(ibot, optimizer, None, *crops, **RATES)
        training_step(ibot, optimizer, None, *batch(), **RATES)
        runs.append(everything(ibot, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def step(guard: NonFiniteGuard, number: int, loss: float = 1.0, grad_norm: float = 1.0) -> str:
    return guard.update({"step": number, "loss": loss, "grad_norm": grad_norm})


def test_several_bad_steps_in_a_row_are_trouble_and_single_ones_are_not() -> None:
    guard = NonFiniteGuard(scaled=False, uniform=5.0)
    for i in range(3 * IN_A_ROW):
        step(guard, i, loss=NAN if i % 2 else 1.0)
        assert not guard.should_roll_back()
    assert guard.skipped == 3 * IN_A_ROW // 2
    for i in range(IN_A_ROW):
        assert "gradient is not finite" in step(guard, 100 + i, grad_norm=INF)
    assert guard.should_roll_back()
    assert not guard.rolled_back_before(), "the first time"
    guard.rolled_back(90)
    guard.restore(guard.state(), 90)
    assert not guard.should_roll_back()
    for i in range(IN_A_ROW):
        step(guard, 105 + i, loss=NAN)
    assert guard.rolled_back_before(), "soon after"


def test_the_first_loss_counts_also_where_its_gradients_overflow() -> None:
    guard = NonFiniteGuard(scaled=True, uniform=5.0)
    step(guard, 0, loss=9.0, grad_norm=INF)
    for i in range(1, 100):
        step(guard, i, loss=8.5)  # plausible only by the first step
    assert guard.last_good == 99


def test_overflows_of_loss_scaling_are_counted_apart_and_bounded() -> None:
    guard = NonFiniteGuard(scaled=True, uniform=5.0)
    for i in range(OVERFLOWS_IN_A_ROW - 1):
        assert step(guard, i, grad_norm=INF) == "", "the scale is being found"
    assert not guard.should_roll_back()
    assert (guard.skipped, guard.overflows) == (0, OVERFLOWS_IN_A_ROW - 1)
    step(guard, 50, grad_norm=NAN)
    assert guard.should_roll_back()
    step(guard, 51, loss=NAN, grad_norm=NAN)
    assert (guard.skipped, guard.overflows) == (1, OVERFLOWS_IN_A_ROW)


@pytest.mark.parametrize(("overflows", "bad"), [(OVERFLOWS_IN_A_ROW, 0), (1, IN_A_ROW)])
def test_a_streak_begins_with_its_first_overflow(overflows: int, bad: int) -> None:
    guard = NonFiniteGuard(scaled=True, uniform=5.0)
    for i in range(5):
        step(guard, i)
    for i in range(5, 5 + overflows + bad):
        step(guard, i, loss=1.0 if i < 5 + overflows else NAN, grad_norm=INF)
    assert guard.should_roll_back()
    assert guard.first_bad == 5
    assert guard.diverging_since() is None


def test_spread_is_none_for_equal_images_and_much_for_random_tokens() -> None:
    images = torch.randn(16, 3, 16, 16)
    assert spread(Tokens(lambda x: torch.ones(len(x), 64)), images, None) == 0
    wide = spread(Tokens(lambda x: torch.randn(len(x), 64)), images, None)
    assert 0.8 < wide < 1.2


class Tokens(torch.nn.Module):
    """Class tokens [B, C] as a backbone gives them."""

    def __init__(self, tokens: Any) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tokens(x).unsqueeze(1)


@pytest.mark.parametrize(
    ("shows", "word"),
    [
        ({"teacher_entropy": 4.15}, "targets are uniform"),
        ({"cls": 4.16}, "guesses"),
        ({"spread": 0.001}, "look alike"),
        ({"prototypes": 1.1}, "the same prototype"),
    ],
)
def test_the_alarm_is_raised_once_for_a_sign_that_lasts(shows: dict[str, float], word: str) -> None:
    alarm, sound = CollapseAlarm(64, 1.0, 20, images=8), {"teacher_entropy": 2.0, "cls": 3.0}
    sound |= {"spread": 0.4, "prototypes": 30.0}
    said = []
    for number in range(0, 60, 10):
        record = {"step": number, **sound, **shows}
        said.append(alarm.add(record))
        assert record["entropy_share"] == pytest.approx(record["teacher_entropy"] / 4.1589, 1e-3)
    assert [len(lines) for lines in said] == [0, 0, 1, 0, 0, 0]
    assert word in said[2][0]
    assert alarm.add({"step": 60, **sound}) == []
    assert [alarm.add({"step": n, **sound, **shows}) for n in (70, 80)] == [[], []]
    assert len(alarm.add({"step": 90, **sound, **shows})) == 1, "it had gone, and came again"
