"""Ten classes of shape for drawn photos: each a list of polygons in about the unit disc."""

from collections.abc import Callable

import numpy as np

Rng = np.random.Generator
Shape = list[tuple[np.ndarray, bool]]  # polygons [n, 2]; True adds, False cuts


def rotation(angle: float) -> np.ndarray:
    return np.array(((np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))))


def disc(x: float, y: float, radius: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return np.stack((x + radius * np.cos(angle), y + radius * np.sin(angle)), 1)


def _box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array(((x0, y0), (x1, y0), (x1, y1), (x0, y1)))


def ribbon(path: np.ndarray, width: float) -> np.ndarray:
    """The outline of a line along `path` [n, 2]."""
    along = np.gradient(path, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    side = along[:, ::-1] * (-width / 2, width / 2)
    return np.concatenate((path + side, (path - side)[::-1]))


def _bars(rng: Rng, height: float, periods: float) -> Shape:
    """Four to seven parallel bars across a square, bent by a sine of that height."""
    count = int(rng.integers(4, 8))
    x, phase = np.linspace(-0.85, 0.85, 40), rng.uniform(0, 2 * np.pi)
    bend = height * np.sin(np.pi * periods * x + phase)
    width = 1.7 / count * rng.uniform(0.35, 0.6)
    rows = np.linspace(-0.8, 0.8, count)
    return [(ribbon(np.stack((x, row + bend), 1), width), True) for row in rows]


def _branches(rng: Rng) -> Shape:
    """A bent stem with leaves to the left and right in turn, and one at its tip."""
    t, bow = np.linspace(0, 1, 24), rng.uniform(-0.35, 0.35)
    stem = np.stack((bow * np.sin(np.pi * t), 1 - 1.6 * t), 1)
    shape: Shape = [(ribbon(stem, rng.uniform(0.06, 0.1)), True)]
    count, lean, length = int(rng.integers(6, 10)), rng.uniform(0.7, 1.1), rng.uniform(0.5, 0.7)
    for i, at in enumerate(np.linspace(0.2, 1, count)):
        last = i == count - 1
        angle = -np.pi / 2 + (0.0 if last else lean * (1 if i % 2 else -1))
        shape.append((_leaf(stem[round(at * 23)], angle, length * (1.1 - 0.4 * at)), True))
    return shape


def _leaf(foot: np.ndarray, angle: float, length: float) -> np.ndarray:
    t = np.linspace(0, 1, 12)
    half = 0.2 * length * np.sin(np.pi * t**0.8)
    outline = np.stack((np.concatenate((t, t[::-1])) * length, np.concatenate((half, -half[::-1]))))
    return foot + (rotation(angle) @ outline).T


def _checks(rng: Rng) -> Shape:
    """Every other cell of a square of four to six cells a side."""
    count, odd = int(rng.integers(4, 7)), int(rng.integers(2))
    edge = np.linspace(-0.8, 0.8, count + 1)
    cells = [(i, j) for i in range(count) for j in range(count) if (i + j) % 2 == odd]
    return [(_box(edge[i], edge[j], edge[i + 1], edge[j + 1]), True) for i, j in cells]


def _crosses(rng: Rng) -> Shape:
    """Two bars at right angles."""
    half = rng.uniform(0.16, 0.32)
    return [(_box(-0.95, -half, 0.95, half), True), (_box(-half, -0.95, half, 0.95), True)]


def _dots(rng: Rng) -> Shape:
    """Five to nine discs that do not touch."""
    count = int(rng.integers(5, 10))
    turn, rank = rng.uniform(0, 2 * np.pi), np.arange(count) + 0.4
    away, angle = 0.82 * np.sqrt(rank / count), turn + 2.39996 * rank  # as sunflower seeds lie
    radius = rng.uniform(0.4, 0.6, count) / np.sqrt(count)
    spots = zip(away * np.cos(angle), away * np.sin(angle), radius, strict=True)
    return [(disc(x, y, r), True) for x, y, r in spots]


def _houses(rng: Rng) -> Shape:
    """Walls, a roof, a chimney; a door and windows cut out."""
    wide, eaves = rng.uniform(0.55, 0.8), rng.uniform(-0.25, 0.05)
    roof = np.array(
        ((-wide - 0.15, eaves), (wide + 0.15, eaves), (0, eaves - rng.uniform(0.5, 0.7)))
    )
    door, side = rng.uniform(-0.1, 0.1), rng.choice((-1, 1))
    chimney = side * wide * 0.6
    shape: Shape = [
        (_box(-wide, eaves - 0.02, wide, 0.8), True),
        (_box(chimney - 0.1, eaves - 0.6, chimney + 0.1, eaves), True),
        (roof, True),
        (_box(door - 0.13, 0.3, door + 0.13, 0.8), False),
    ]
    for x in (-0.6 * wide, 0.6 * wide):
        shape.append((_box(x - 0.13, eaves + 0.12, x + 0.13, eaves + 0.38), False))
    return shape


def _rings(rng: Rng) -> Shape:
    """Two to four circles about one center."""
    count, thick = int(rng.integers(2, 5)), rng.uniform(0.4, 0.6)
    shape: Shape = []
    for i in range(count, 0, -1):
        shape += [(disc(0, 0, 0.95 * i / count), True)]
        shape += [(disc(0, 0, 0.95 * (i - thick) / count), False)]
    return shape


def _spirals(rng: Rng) -> Shape:
    """A line that winds out of the center, two or three times round, either way."""
    turns, hand = rng.uniform(2, 3.2), rng.choice((-1, 1))
    t = np.linspace(0.04, 1, 90)
    angle = 2 * np.pi * turns * t
    path = 0.9 * t[:, None] * np.stack((np.cos(angle), hand * np.sin(angle)), 1)
    return [(ribbon(path, rng.uniform(0.38, 0.55) * 0.9 / turns), True)]


def _stars(rng: Rng) -> Shape:
    """Five to seven spikes."""
    spikes = int(rng.integers(5, 8))
    angle = np.arange(2 * spikes) * np.pi / spikes
    radius = np.where(np.arange(2 * spikes) % 2, rng.uniform(0.35, 0.5), 1.0)
    return [(np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1), True)]


def _stripes(rng: Rng) -> Shape:
    """Straight bars."""
    return _bars(rng, 0.0, 0.0)


def _waves(rng: Rng) -> Shape:
    """The same bars, wavy."""
    return _bars(rng, rng.uniform(0.1, 0.16), rng.uniform(2.2, 3.5))


SHAPES: dict[str, Callable[[Rng], Shape]] = {
    "branches": _branches,
    "checks": _checks,
    "crosses": _crosses,
    "dots": _dots,
    "houses": _houses,
    "rings": _rings,
    "spirals": _spirals,
    "stars": _stars,
    "stripes": _stripes,
    "waves": _waves,
}
