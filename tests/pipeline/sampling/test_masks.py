"""Masks: the published sampler's statistics, its logged runs, and the compiled twin bit for bit."""

import random
import threading

import numpy as np
import pytest
from paths import REFERENCE
from scipy import ndimage, stats

from ibeton.pipeline.sampling.masks import (
    KeyDraws,
    MaskConfig,
    draw_mask_reference,
    draw_masks,
    draw_ratio,
)
from ibeton.pipeline.sampling.rng import MASK, sample_key

PUBLISHED = np.load(REFERENCE / "masks.npz")
LOGGED = np.load(REFERENCE / "masks_logged.npz")
SETTINGS = sorted({name.split("/")[0] for name in PUBLISHED.files if "/" in name})
SEED = 20_26
N = 20_000  # views, as many as the published counts are taken over
LEAST_P = 1e-4  # some 100 tests at one fixed seed: by chance, one in a hundred seeds would fail


def config_of(setting: str) -> MaskConfig:
    return MaskConfig(
        shape=str(PUBLISHED[f"{setting}/pred_shape"]),
        ratio=tuple(PUBLISHED[f"{setting}/pred_ratio"].tolist()),
        ratio_var=tuple(PUBLISHED[f"{setting}/pred_ratio_var"].tolist()),
    )


def grid_of(setting: str) -> tuple[int, int]:
    return int(PUBLISHED[f"{setting}/h"]), int(PUBLISHED[f"{setting}/w"])


@pytest.fixture(scope="module", params=SETTINGS)
def drawn(request) -> tuple[str, np.ndarray]:
    """A setting's name and 20,000 masks, bool [N, h, w]."""
    setting = request.param
    masks = draw_masks(config_of(setting), SEED, 0, np.arange(N), 1, grid_of(setting))
    return setting, masks[0]


def same_histogram_p(ours: np.ndarray, published: np.ndarray) -> float:
    """Return the p-value of two histograms being of one distribution; rare bins are pooled."""
    size = max(len(ours), len(published))
    table = np.zeros((2, size))
    table[0, : len(ours)], table[1, : len(published)] = ours, published
    order = np.argsort(-table.sum(0), kind="stable")
    table = table[:, order]
    common = int((table.sum(0) >= 20).sum())
    rest = table[:, common:].sum(1, keepdims=True)
    table = table[:, :common]
    if rest.sum() >= 20:
        table = np.concatenate([table, rest], axis=1)
    elif common:
        table[:, -1:] += rest
    if table.shape[1] < 2:
        return 1.0 if (table[0] == table[1]).all() else 0.0
    return float(stats.chi2_contingency(table).pvalue)


def same_frequencies_p(ours: np.ndarray, published: np.ndarray) -> float:
    """Return the p-value of the cell that differs most, times the cells (Bonferroni)."""
    mean = (ours + published) / 2
    spread = np.sqrt(np.maximum(mean * (1 - mean), 1 / N) * 2 / N)
    worst = np.abs((ours - published) / spread).max()
    return float(min(1.0, 2 * stats.norm.sf(worst) * ours.size))


def test_counts_have_the_published_distribution(drawn):
    setting, masks = drawn
    counts = np.bincount(masks.sum((1, 2)), minlength=masks[0].size + 1)
    assert same_histogram_p(counts, PUBLISHED[f"{setting}/count_hist"]) > LEAST_P
    empty = np.array([counts[0] / N])
    assert same_frequencies_p(empty, PUBLISHED[f"{setting}/empty_fraction"].reshape(1)) > LEAST_P


def test_every_cell_is_masked_as_often_as_published(drawn):
    setting, masks = drawn
    assert same_frequencies_p(masks.mean(0), PUBLISHED[f"{setting}/position_freq"]) > LEAST_P


@pytest.mark.parametrize("cell", ["centre", "corner"])
def test_cells_are_masked_together_as_often_as_published(drawn, cell):
    setting, masks = drawn
    h, w = masks.shape[1:]
    # The reference's "centre" is this flat index, which is right of the middle where h is odd.
    flat = h * w // 2 + w // 2 if cell == "centre" else 0
    together = masks[masks.reshape(N, -1)[:, flat]].sum(0) / N
    published = PUBLISHED[f"{setting}/joint_freq_with_{cell}_cell"].astype(float)
    assert same_frequencies_p(together, published) > LEAST_P


def components_of(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each 4-connected component's mask number, cells and box [height, width]."""
    within = np.zeros((3, 3, 3), dtype=bool)
    within[1] = ndimage.generate_binary_structure(2, 1)
    labels, n = ndimage.label(masks, structure=within)
    boxes = ndimage.find_objects(labels)
    owners = np.array([box[0].start for box in boxes], dtype=int)
    sides = np.array([[s.stop - s.start for s in box[1:]] for box in boxes], dtype=int)
    return owners, np.bincount(labels.ravel(), minlength=n + 1)[1:], sides.reshape(-1, 2)


def largest_of(owners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    largest = np.zeros(N, dtype=int)
    np.maximum.at(largest, owners, sizes)
    return largest


def test_components_have_the_published_numbers_sizes_and_boxes(drawn):
    setting, masks = drawn
    owners, sizes, sides = components_of(masks)
    published = {
        name: PUBLISHED[f"{setting}/{name}_hist"]
        for name in ("n_components", "component_size", "largest_component", "component_bbox")
    }
    ours = {
        "n_components": np.bincount(np.bincount(owners, minlength=N)),
        "component_size": np.bincount(sizes),
        "largest_component": np.bincount(largest_of(owners, sizes)),
        "component_bbox": np.zeros_like(published["component_bbox"]),
    }
    np.add.at(ours["component_bbox"], (sides[:, 0], sides[:, 1]), 1)
    if published["largest_component"][0] == 0:  # where empty masks are not counted
        ours["largest_component"][0] = 0
    for name, histogram in published.items():
        assert same_histogram_p(ours[name].ravel(), histogram.ravel()) > LEAST_P, name


def test_neighbors_agree_and_differ_as_often_as_published(drawn):
    setting, masks = drawn
    for name, histogram in neighbor_histograms(masks).items():
        assert same_histogram_p(histogram, PUBLISHED[f"{setting}/{name}_hist"]) > LEAST_P, name


def neighbor_histograms(masks: np.ndarray) -> dict[str, np.ndarray]:
    down, right = (masks[:, :-1], masks[:, 1:]), (masks[:, :, :-1], masks[:, :, 1:])
    both = sum((a & b).sum((1, 2)) for a, b in (down, right))
    differ = sum((a ^ b).sum((1, 2)) for a, b in (down, right))
    return {"neighbour_pairs": np.bincount(both), "boundary_edges": np.bincount(differ)}


def test_masks_fall_short_of_their_ratio_as_much_as_published(drawn):
    setting, masks = drawn
    config = config_of(setting)
    ratio, ratio_var = np.array(config.ratio), np.array(config.ratio_var)
    ratios = np.array(
        [draw_ratio(np.uint64(sample_key(SEED, 0, i, MASK)), ratio, ratio_var)[0] for i in range(N)]
    )
    short = ratios * masks[0].size - masks.sum((1, 2))
    assert short.min() > -1e-9
    spread = short.std() * np.sqrt(2 / N)
    published = float(PUBLISHED[f"{setting}/mean_requested_minus_got"])
    assert abs(short.mean() - published) < 4 * spread
    # float32 ratios carry an error, which rounding takes out of both sides
    theirs = PUBLISHED[f"{setting}/ratio_drawn"].astype(float).round(6)
    theirs_short = theirs * masks[0].size - PUBLISHED[f"{setting}/count"]
    assert stats.ks_2samp(ratios.round(6), theirs).pvalue > LEAST_P
    assert stats.ks_2samp(short.round(3), theirs_short.round(3)).pvalue > LEAST_P


def test_these_tests_notice_a_slightly_wrong_aspect():
    config = MaskConfig(aspect=(0.4, 1 / 0.4))
    masks = draw_masks(config, SEED, 0, np.arange(N), 1, (14, 14))[0]
    edges = neighbor_histograms(masks)["boundary_edges"]
    assert same_histogram_p(edges, PUBLISHED["block14/boundary_edges_hist"]) < LEAST_P


class LoggedDraws:
    """The draws that the published sampler logged; fails if they are asked for in other words."""

    def __init__(self, name: str, mask: int) -> None:
        part = slice(*LOGGED[f"{name}/offsets"][mask : mask + 2])
        fields = ("kind", "arg_a", "arg_b", "value")
        rows = (LOGGED[f"{name}/{field}"][part].tolist() for field in fields)
        self.log = list(zip(*rows, strict=True))[::-1]

    def uniform(self, low: float, high: float) -> float:
        kind, a, b, value = self.log.pop()
        assert (kind, a, b) == (0, low, high)
        return value

    def randint(self, low: int, high: int) -> int:
        kind, a, b, value = self.log.pop()
        assert (kind, a, b) == (1, low, high)
        return int(value)

    def choice(self, options: list[float]) -> float:
        kind, length, chosen, value = self.log.pop()
        assert (kind, length, value) == (2, len(options), options[int(chosen)])
        return value


@pytest.mark.parametrize("name", ["block14", "block7", "block14_03"])
def test_the_published_draws_give_the_published_block_masks(name):
    config = MaskConfig(
        ratio=tuple(LOGGED[f"{name}/pred_ratio"].tolist()),
        ratio_var=tuple(LOGGED[f"{name}/pred_ratio_var"].tolist()),
    )
    grid = int(LOGGED[f"{name}/h"]), int(LOGGED[f"{name}/w"])
    for i, published in enumerate(LOGGED[f"{name}/masks"]):
        draws = LoggedDraws(name, i)
        assert np.array_equal(draw_mask_reference(config, grid, draws), published)
        assert not draws.log


class SeededDraws:
    """Python's and NumPy's generators, which the published random shape uses."""

    def __init__(self, seed: int) -> None:
        source = random.Random(seed)
        self.uniform, self.randint, self.choice = source.uniform, source.randint, source.choice
        self.shuffle = np.random.RandomState(seed).shuffle


def test_the_published_seed_gives_the_published_random_masks():
    draws = SeededDraws(int(LOGGED["rand14/seed"]))
    for published in LOGGED["rand14/masks"]:
        mask = draw_mask_reference(MaskConfig(shape="rand"), (14, 14), draws)
        assert np.array_equal(mask, published)


@pytest.mark.parametrize("shape", ["block", "rand"])
@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (12, 10), (6, 6), (3, 3), (2, 5), (1, 1)])
@pytest.mark.parametrize(
    ("ratio", "ratio_var"),
    [
        ((0.0, 0.3), (0.0, 0.2)),
        ((0.3,), (0.2,)),
        ((0.6, 0.2, 0.9), (0.1, 0.0, 0.1)),
        ((1.0,), (0.0,)),
    ],
)
def test_compiled_masks_equal_plain_python_bit_for_bit(shape, grid, ratio, ratio_var):
    config = MaskConfig(shape=shape, ratio=ratio, ratio_var=ratio_var)
    indices = np.array([*range(40), 1_281_166, 2**40])
    masks = draw_masks(config, 3, 11, indices, 2, grid)
    assert masks.shape == (2, len(indices), *grid)
    assert masks.dtype == np.bool_
    for v in range(2):
        for b, index in enumerate(indices.tolist()):
            expected = draw_mask_reference(config, grid, KeyDraws(3, 11, index, v))
            assert np.array_equal(masks[v, b], expected)


def test_a_mask_depends_on_seed_epoch_index_and_view_alone():
    config, order = MaskConfig(ratio=(0.5,), ratio_var=(0.1,)), np.random.default_rng(0)
    whole = draw_masks(config, 1, 2, np.arange(64), 2, (14, 14))
    shuffled = order.permutation(64)
    parts = [draw_masks(config, 1, 2, part, 2, (14, 14)) for part in np.split(shuffled, [5, 40])]
    assert np.array_equal(np.concatenate(parts, axis=1), whole[:, shuffled])
    assert np.array_equal(draw_masks(config, 1, 2, np.arange(64), 5, (14, 14))[:2], whole)
    for seed, epoch in ((2, 2), (1, 3)):
        other = draw_masks(config, seed, epoch, np.arange(64), 2, (14, 14))
        assert not (other == whole).all((2, 3)).any()
    assert not (whole[0] == whole[1]).all((1, 2)).any()


def test_threads_draw_the_same_masks_as_one():
    config = MaskConfig()
    parts = np.array_split(np.arange(4000), 4)
    results: list[np.ndarray | None] = [None] * 4

    def work(i: int) -> None:
        results[i] = draw_masks(config, 0, 0, parts[i], 2, (14, 14))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = draw_masks(config, 0, 0, np.arange(4000), 2, (14, 14))
    assert np.array_equal(np.concatenate(results, axis=1), whole)


def test_nothing_is_masked_before_the_start_epoch():
    config = MaskConfig(ratio=(0.5,), ratio_var=(0.1,), start_epoch=50)
    assert not PUBLISHED["before_start_epoch_any_masked"]
    assert not draw_masks(config, 0, 49, np.arange(8), 2, (14, 14)).any()
    assert draw_masks(config, 0, 50, np.arange(8), 2, (14, 14)).any((2, 3)).all()


def test_an_empty_batch_gives_empty_masks():
    empty = draw_masks(MaskConfig(), 0, 0, np.zeros(0, dtype=np.int64), 2, (14, 14))
    assert empty.shape == (2, 0, 14, 14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": (1.5,), "ratio_var": (0.0,)}, "--pred-ratio 1.5"),
        ({"ratio": (-0.1,), "ratio_var": (0.0,)}, "--pred-ratio -0.1"),
        ({"ratio": (float("nan"),), "ratio_var": (0.0,)}, "--pred-ratio nan"),
        ({"ratio": (0.1,), "ratio_var": (0.2,)}, "--pred-ratio-var 0.2"),
        ({"ratio": (0.9,), "ratio_var": (0.2,)}, "more than all cells"),
        (
            {"ratio": (0.3,), "ratio_var": (0.2, 0.1)},
            "--pred-ratio has 1 entries and --pred-ratio-var 2",
        ),
        ({"ratio": (), "ratio_var": ()}, "--pred-ratio has 0 entries"),
        ({"shape": "stripes"}, "--pred-shape is 'stripes'"),
        ({"aspect": (0.0, 1.0)}, "mask aspect"),
        ({"aspect": (3.0, 0.3)}, "mask aspect"),
    ],
)
def test_impossible_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MaskConfig(**options)


@pytest.mark.parametrize(
    ("indices", "views", "grid", "message"),
    [
        (np.zeros((2, 2), dtype=int), 2, (14, 14), "indices have shape"),
        (np.zeros(2), 2, (14, 14), "float64"),
        (np.arange(2), 0, (14, 14), "views is 0"),
        (np.arange(2), 257, (14, 14), "views is 257"),
        (np.arange(2), 2, (0, 14), "grid is"),
    ],
)
def test_impossible_batches_are_named(indices, views, grid, message):
    with pytest.raises(ValueError, match=message):
        draw_masks(MaskConfig(), 0, 0, indices, views, grid)
