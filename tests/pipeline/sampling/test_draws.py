"""20,000 draws against the distributions that the published code was seen to draw from."""

import numpy as np
import pytest
from paths import REFERENCE
from scipy import stats

from ibeton.pipeline.sampling.draws import (
    DRAW,
    JITTER_ORDERS,
    ViewSpec,
    draw_sample,
    published_views,
    spec_table,
)

PUBLISHED = np.load(REFERENCE / "augment.npz")
COUNT = 20_000
CHANCE = 1e-4  # a right sampler fails one such test in ten thousand; seeds are fixed, so ours never
CROPS = [k.split("/")[0] for k in PUBLISHED if k.endswith("/first_500")]
OPS = ["hflip", "brightness", "contrast", "saturation", "hue", "gray", "blur", "solarize"]


def draw_many(views: list[ViewSpec], height: int, width: int, seed: int = 0) -> np.ndarray:
    specs = spec_table(views)
    out = np.zeros((COUNT, len(views)), DRAW)
    for index in range(COUNT):
        draw_sample(specs, seed, 0, index, height, width, out[index])
    return out


def assert_same_histogram(ours: np.ndarray, theirs: np.ndarray) -> None:
    table = np.stack([np.ravel(ours), np.ravel(theirs)])
    rare = table.sum(0) < 20  # chi-square wants bins that are not nearly empty
    table = np.column_stack([table[:, ~rare], table[:, rare].sum(1)])
    table = table[:, table.sum(0) > 0]
    if table.shape[1] > 1:
        assert stats.chi2_contingency(table).pvalue > CHANCE


@pytest.mark.parametrize("name", CROPS)
def test_boxes_have_the_published_areas_aspects_and_positions(name: str) -> None:
    case = {k.split("/")[1]: v for k, v in PUBLISHED.items() if k.startswith(f"{name}/")}
    height, width = int(case["image_h"]), int(case["image_w"])
    view = ViewSpec(96, tuple(case["scale"]), 0.5, 0.0)
    draws = draw_many([view], height, width)[:, 0]
    h, w = draws["height"].astype(float), draws["width"].astype(float)
    area, log_aspect = h * w / (height * width), np.log(w / h)
    for ours, key in ((area, "area"), (log_aspect, "log_aspect")):
        ends = (0, 1) if key == "area" else (-0.35, 0.35)
        theirs = case[f"{key}_hist"]
        assert_same_histogram(np.histogram(ours, len(theirs), ends)[0], theirs)
        assert ours.mean() == pytest.approx(
            float(case[f"mean_{key}"]),
            abs=5 * float(case[f"std_{key}"]) * (2 / COUNT) ** 0.5 + 1e-12,
        )
    for ours, key in (
        ((draws["left"] + w / 2) / width, "centre_x"),
        ((draws["top"] + h / 2) / height, "centre_y"),
    ):
        assert_same_histogram(np.histogram(ours, 20, (0, 1))[0], case[f"{key}_hist"])
    joint = np.histogram2d(area, log_aspect, (20, 14), ((0, 1), (-0.35, 0.35)))[0]
    assert_same_histogram(joint, case["area_vs_aspect_hist"])


@pytest.mark.parametrize(("name", "view"), [("global1", 0), ("global2", 1), ("local", 2)])
def test_operations_have_the_published_chances_and_factors(name: str, view: int) -> None:
    case = {k.split("/")[1]: v for k, v in PUBLISHED.items() if k.startswith(f"ops_{name}/")}
    views = published_views(2, 1, 224, 96, (0.25, 1), (0.05, 0.25))
    draws = draw_many(views, 375, 500, seed=7)[:, view]
    jitter = draws["jitter"] == 1
    fired = {"hflip": draws["flip"], "gray": draws["gray"], "solarize": draws["solarize"]}
    fired |= dict.fromkeys(("brightness", "contrast", "saturation", "hue"), draws["jitter"])
    fired["blur"] = draws["blur_radius"] > 0
    n = int(case["n"])
    for op, count in zip(OPS, case["op_count"], strict=True):
        ours = int(fired[op].sum())
        if 0 < count < n:
            assert stats.chi2_contingency([[ours, COUNT - ours], [count, n - count]])[1] > CHANCE
        else:
            assert ours == (COUNT if count else 0), op
    order = np.bincount(draws["order"][jitter], minlength=24)
    theirs = dict(zip(map(tuple, case["jitter_order"]), case["jitter_order_count"], strict=True))
    # Theirs are indices into the eight operations, where the four of the jitter start at 1.
    assert_same_histogram(order, np.array([theirs[tuple(o + 1)] for o in JITTER_ORDERS]))
    factors = {f"adjust_{op}": draws[op][jitter] for op in ("brightness", "contrast", "saturation")}
    factors |= {"adjust_hue": draws["hue"][jitter]}
    if fired["blur"].any():
        factors["blur"] = draws["blur_radius"][fired["blur"]]
    for op, values in factors.items():
        expected = case[f"param_{op}_quantiles"]
        # The reference gives quantiles only; uniform they are, between its ends.
        low, high = {
            "blur": (0.1, 2),
            "adjust_hue": (-0.1, 0.1),
            "adjust_saturation": (0.8, 1.2),
        }.get(op, (0.6, 1.4))
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > CHANCE, op
        quantiles = np.quantile(values, np.linspace(0, 1, len(expected)))
        drawn = case["op_count"][6 if op == "blur" else 1]  # how many theirs come from
        sigma = 0.5 * (1 / drawn + 1 / len(values)) ** 0.5 * (high - low)
        np.testing.assert_allclose(quantiles, expected, atol=4.5 * sigma)


def test_operations_are_drawn_independently() -> None:
    views = published_views(2, 0, 224, 96, (0.25, 1), (0.05, 0.25))
    draws = draw_many(views, 375, 500, seed=3)
    first = draws[:, 1]
    bits = np.stack(
        [*(first[op] for op in ("flip", "jitter", "gray", "solarize")), first["blur_radius"] > 0]
        + [draws[:, 0][op] for op in ("flip", "jitter", "gray")]
    ).astype(float)
    correlation = np.corrcoef(bits) - np.eye(len(bits))
    assert np.abs(correlation).max() < 4.5 / COUNT**0.5


def test_draws_depend_on_seed_epoch_index_and_view_alone() -> None:
    specs = spec_table(published_views(2, 2, 224, 96, (0.25, 1), (0.05, 0.25)))

    def draws(seed: int, epoch: int, index: int) -> bytes:
        out = np.zeros(4, DRAW)
        draw_sample(specs, seed, epoch, index, 375, 500, out)
        assert len({row.tobytes() for row in out}) == 4, "every view has draws of its own"
        return out.tobytes()

    assert draws(0, 0, 0) == draws(0, 0, 0)
    keys = [(s, e, i) for s in range(3) for e in range(3) for i in range(50)]
    assert len({draws(*key) for key in keys}) == len(keys)
