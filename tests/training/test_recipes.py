"""Every value of every recipe, held to the table of what was published and where."""

import json
from typing import Any

import pytest
from paths import REFERENCE

from ibeton.training.config import from_values
from ibeton.training.recipes import RECIPES

TABLE = json.loads((REFERENCE / "recipes.json").read_text())


def settings(recipe: str, **values: Any) -> dict[str, Any]:
    """As JSON has them: tuples are lists."""
    given = {"recipe": recipe, "data": "unused", **values}
    return json.loads(json.dumps(from_values(given).resolved()))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_value_of_a_recipe_is_the_one_in_the_table(recipe: str) -> None:
    found, expected = settings(recipe), TABLE["recipes"][recipe]
    assert {name: found[name] for name in expected} == {n: v for n, (v, _) in expected.items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_value_that_a_recipe_sets_has_a_source(recipe: str) -> None:
    table = TABLE["recipes"][recipe]
    assert set(RECIPES[recipe]) <= set(table)
    for name, (_, sources) in table.items():
        assert set(sources.split(", ")) <= set(TABLE["sources"]), name


def test_the_table_has_no_other_recipes() -> None:
    assert set(TABLE["recipes"]) == set(RECIPES)


def test_an_architecture_chooses_its_recipe_and_options_override_it() -> None:
    found = from_values({"arch": "vit_b", "lr": 1e-3, "data": "unused"}).resolved()
    assert (found["clip_grad"], found["lr"]) == (0.3, 1e-3)


@pytest.mark.parametrize(
    ("epochs", "recipe", "expected"),
    [
        (1, "vit_s", (0, 0, 0, 0)),
        (5, "vit_s", (1, 2, 0, 1)),
        (20, "vit_s", (2, 6, 0, 1)),
        (100, "vit_s", (10, 30, 0, 1)),
        (20, "vit_b", (2, 6, 0, 3)),
        (60, "swin_t7", (6, 18, 10, 1)),
        (300, "swin_t7", (10, 30, 50, 1)),
    ],
)
def test_short_runs_have_short_warm_ups(
    epochs: int, recipe: str, expected: tuple[int, ...]
) -> None:
    config = from_values({"recipe": recipe, "epochs": epochs, "data": "unused"})
    found = config.resolved()
    names = ("warmup_epochs", "warmup_teacher_temp_epochs", "pred_start_epoch")
    assert tuple(found[name] for name in (*names, "freeze_last_layer")) == expected
    recipe_values = settings(recipe)
    changed = any(found[name] != recipe_values[name] for name in names)
    assert [note.split(" is ")[0] for note in config.notes] == [f"--epochs {epochs}"] * changed


def test_warm_ups_that_were_given_stay_and_are_refused_if_they_do_not_fit() -> None:
    config = from_values({"epochs": 5, "warmup_epochs": 4, "data": "unused"})
    assert config.run.warmup_epochs == 4
    assert config.model.warmup_teacher_temp_epochs == 2
    with pytest.raises(ValueError, match="--warmup-epochs 6 does not fit in --epochs 5"):
        from_values({"epochs": 5, "warmup_epochs": 6, "data": "unused"})
