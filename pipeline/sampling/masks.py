"""Block-wise and random masks over the patch grid: which tokens the student has to predict.

The distribution is that of iBOT's published sampler; block-wise masks follow BEiT (Bao et al.,
2021, algorithm 1). Compiled code draws a batch per call, without the GIL. A mask depends only on
(seed, epoch, sample index, view). `draw_mask_reference` is the same sampler in plain Python.
"""

import math
from dataclasses import dataclass

import numpy as np

from ibeton.pipeline.compiled import compiled
from ibeton.pipeline.sampling.rng import (
    MASK,
    MOST_VIEWS,
    Uint64,
    randint,
    randint_reference,
    sample_key,
    sample_key_reference,
    uniform,
    uniform_reference,
)

SHAPES = ("block", "rand")
TRIES = 10  # blocks tried in a round, before the mask is left as it is


@dataclass(frozen=True)
class MaskConfig:
    """Distribution of the masks; the defaults are the published ViT recipe.

    ratio, ratio_var: of equal length. A view draws ratio +- ratio_var uniformly for each entry and
        keeps one of them with equal probability: (0, 0.3) and (0, 0.2) leave half of the views
        unmasked and mask 0.1 - 0.5 of the others.
    shape: "block" or "rand" (cells anywhere).
    start_epoch: masks are empty before it.
    aspect: smallest and largest height / width of a block, drawn log-uniformly.

    Raises ValueError, naming the option of `train.py`, for invalid values.
    """

    shape: str = "block"
    ratio: tuple[float, ...] = (0.0, 0.3)
    ratio_var: tuple[float, ...] = (0.0, 0.2)
    start_epoch: int = 0
    aspect: tuple[float, float] = (0.3, 1 / 0.3)

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(
                f"--pred-shape is {self.shape!r}; it must be one of {', '.join(SHAPES)}"
            )
        if not self.ratio or len(self.ratio) != len(self.ratio_var):
            raise ValueError(
                f"--pred-ratio has {len(self.ratio)} entries and --pred-ratio-var "
                f"{len(self.ratio_var)}; give one variance a ratio, and at least one of each"
            )
        for mean, var in zip(self.ratio, self.ratio_var, strict=True):
            if not 0.0 <= mean <= 1.0:
                raise ValueError(f"--pred-ratio {mean} is not a share of the cells; give 0 to 1")
            if not 0.0 <= var <= mean:
                raise ValueError(
                    f"--pred-ratio-var {var} does not lie between 0 and its ratio {mean}; "
                    "lower it, or the share of masked cells would fall below 0"
                )
            if mean + var > 1.0:
                raise ValueError(
                    f"--pred-ratio {mean} + --pred-ratio-var {var} is more than all cells; "
                    "lower either"
                )
        if len(self.aspect) != 2 or not 0.0 < self.aspect[0] <= self.aspect[1] < math.inf:
            raise ValueError(
                f"mask aspect is {self.aspect}; give two positive numbers, the smaller one first"
            )


def draw_masks(
    config: MaskConfig,
    seed: int,
    epoch: int,
    indices: np.ndarray,
    views: int,
    grid: tuple[int, int],
) -> np.ndarray:
    """Return bool [V, B, h, w], True where the student's patch is masked.

    indices: int64 [B], each sample's number in the data set. grid: patches (h, w) of one view.
    Before `config.start_epoch` everything is False.

    Raises ValueError if `indices` is not a vector of integers, or views or grid are out of range.
    """
    indices = np.ascontiguousarray(indices)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise ValueError(
            f"indices have shape {indices.shape} and dtype {indices.dtype}; "
            "give a vector of integers"
        )
    if not 1 <= views <= MOST_VIEWS:
        raise ValueError(f"views is {views}; masks are drawn for 1 to {MOST_VIEWS} views")
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid is {grid}; give two positive numbers of patches, (h, w)")
    masks = np.zeros((views, len(indices), *grid), dtype=np.bool_)  # [V, B, h, w]
    if epoch >= config.start_epoch:
        _draw_batch(
            masks,
            seed,
            epoch,
            indices.astype(np.int64, copy=False),
            config.shape == "block",
            np.asarray(config.ratio, dtype=np.float64),
            np.asarray(config.ratio_var, dtype=np.float64),
            (math.log(config.aspect[0]), math.log(config.aspect[1])),
        )
    return masks


@compiled
def _draw_batch(
    masks: np.ndarray,  # bool [V, B, h, w], all False
    seed: int,
    epoch: int,
    indices: np.ndarray,  # int64 [B]
    block: bool,
    ratio: np.ndarray,  # float64 [entries]
    ratio_var: np.ndarray,  # float64 [entries]
    log_aspect: tuple[float, float],
) -> None:
    views, batch, height, width = masks.shape
    for v in range(views):
        for b in range(batch):
            key = sample_key(seed, epoch, indices[b], MASK + v)
            drawn, counter = draw_ratio(key, ratio, ratio_var)
            wanted = drawn * height * width
            if block:
                _fill_blocks(masks[v, b], wanted, key, counter, log_aspect)
            else:
                _fill_random(masks[v, b].reshape(height * width), int(wanted), key, counter)


@compiled
def _between(key: Uint64, counter: int, low: float, high: float) -> float:
    return low + (high - low) * uniform(key, counter)


@compiled
def draw_ratio(key: Uint64, ratio: np.ndarray, ratio_var: np.ndarray) -> tuple[float, int]:
    """Return a view's ratio and the number of draws made."""
    drawn, counter = ratio.copy(), 0
    for i in range(len(ratio)):
        if ratio_var[i] > 0.0:
            drawn[i] = _between(key, counter, ratio[i] - ratio_var[i], ratio[i] + ratio_var[i])
            counter += 1
    if len(ratio) == 1:
        return drawn[0], counter
    return drawn[randint(key, counter, len(ratio))], counter + 1


@compiled
def _fill_blocks(
    mask: np.ndarray, wanted: float, key: Uint64, counter: int, log_aspect: tuple[float, float]
) -> None:
    """Add blocks to `mask` bool [h, w] until `wanted` cells are masked, or none fits."""
    grid_h, grid_w = mask.shape
    smallest = float((min(grid_h, grid_w) // 3) ** 2)
    left, tries = wanted, 0
    while left > 0 and tries < TRIES:
        tries += 1
        area = _between(key, counter, smallest, left)
        aspect = math.exp(_between(key, counter + 1, log_aspect[0], log_aspect[1]))
        counter += 2
        h, w = int(np.rint(math.sqrt(area * aspect))), int(np.rint(math.sqrt(area / aspect)))
        if h >= grid_h or w >= grid_w:
            continue
        top = randint(key, counter, grid_h - h + 1)
        first = randint(key, counter + 1, grid_w - w + 1)
        counter += 2
        new = h * w
        for i in range(top, top + h):
            for j in range(first, first + w):
                new -= mask[i, j]
        if 0 < new <= left:
            mask[top : top + h, first : first + w] = True
            left -= new
            tries = 0


@compiled
def _fill_random(cells: np.ndarray, count: int, key: Uint64, counter: int) -> None:
    """Mask `count` of the cells bool [N], all False, by Fisher and Yates' shuffle."""
    cells[len(cells) - count :] = True
    for last in range(len(cells) - 1, 0, -1):
        other = randint(key, counter, last + 1)
        counter += 1
        cells[last], cells[other] = cells[other], cells[last]


class KeyDraws:
    """The draws of one sample's view by `rng`: those that the compiled sampler makes."""

    def __init__(self, seed: int, epoch: int, index: int, view: int) -> None:
        self.key = sample_key_reference(seed, epoch, index, MASK + view)
        self.counter = 0

    def uniform(self, low: float, high: float) -> float:
        self.counter += 1
        return low + (high - low) * uniform_reference(self.key, self.counter - 1)

    def randint(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        self.counter += 1
        return low + randint_reference(self.key, self.counter - 1, high - low + 1)

    def choice(self, options: list[float]) -> float:
        return options[self.randint(0, len(options) - 1)]

    def shuffle(self, cells: np.ndarray) -> None:
        for last in range(len(cells) - 1, 0, -1):
            other = self.randint(0, last)
            cells[last], cells[other] = cells[other], cells[last]


def draw_mask_reference(config: MaskConfig, grid: tuple[int, int], draws: KeyDraws) -> np.ndarray:
    """Return one view's mask, bool [h, w]: the published sampler in plain Python. `draws` may be
    anything with the methods of KeyDraws, such as a log of the published sampler's draws."""
    height, width = grid
    ratios = [
        draws.uniform(mean - var, mean + var) if var > 0 else mean
        for mean, var in zip(config.ratio, config.ratio_var, strict=True)
    ]
    wanted = (draws.choice(ratios) if len(ratios) > 1 else ratios[0]) * height * width
    mask = np.zeros((height, width), dtype=np.bool_)
    if config.shape == "rand":
        cells = mask.reshape(-1)
        cells[len(cells) - int(wanted) :] = True
        draws.shuffle(cells)
    else:
        while (left := wanted - mask.sum()) > 0:
            for _ in range(TRIES):
                if _try_block(mask, left, config.aspect, draws):
                    break
            else:
                break  # ten blocks in a row did not fit: the view keeps fewer cells than wanted
    return mask


def _try_block(mask: np.ndarray, left: float, aspect: tuple[float, float], draws: KeyDraws) -> bool:
    """Draw one block; mask it and return True if it adds at least one cell and at most `left`."""
    height, width = mask.shape
    area = draws.uniform((min(height, width) // 3) ** 2, left)
    ratio = math.exp(draws.uniform(math.log(aspect[0]), math.log(aspect[1])))
    h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if h >= height or w >= width:
        return False
    top, first = draws.randint(0, height - h), draws.randint(0, width - w)
    block = mask[top : top + h, first : first + w]
    if not 0 < block.size - block.sum() <= left:
        return False
    block[:] = True
    return True
