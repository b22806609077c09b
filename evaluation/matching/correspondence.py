"""How many patches of a photo are found again in a second view of it (iBOT, appendix).

    ibeton correspondence --checkpoint CHECKPOINT --data FOLDER_OR_BETON

Two random crops of each photo, flipped and changed in color as in training. Each patch of the first
whose middle the second one shows too looks for the patch with the most similar token (cosine). It
is right (`accuracy`) if that is the patch in which its middle lies, and right within one patch
(`accuracy_1`) if it is at most one row and one column away. `chance` and `chance_1` are what a
choice at random would give. `ibeton show correspondence` draws such patches.
"""

import argparse
import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ibeton.evaluation.command import Scores
from ibeton.evaluation.frozen.features import check_finite, evaluating, normalized
from ibeton.evaluation.matching.views import cut_two, draw_two, in_photo, in_view, middles
from ibeton.evaluation.tasks import FrozenTask, Subject
from ibeton.pipeline.store.decode import UnreadablePhoto
from ibeton.pipeline.store.photos import Photos, open_photos
from ibeton.progress import progress
from ibeton.workers import cores, in_threads


def true_places(draws: np.ndarray, size: int, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """Of two views DRAW [2] of `size` pixels: which patches of the first have their middle in the
    second, int64 [m], and the patches there that hold it, int64 [m]."""
    columns = size // patch
    points = middles(torch.arange(columns * columns), columns, patch)
    there = in_view(draws[1], in_photo(draws[0], points, size), size)
    shown = ((there >= 0) & (there < size)).all(axis=1)
    cells = (there[shown] // patch).astype(np.int64)
    return np.flatnonzero(shown), cells[:, 1] * columns + cells[:, 0]


def count_right(found: np.ndarray, true: np.ndarray, columns: int, reach: int) -> int:
    """How many of places `found` int64 [m] are at most `reach` rows and columns from `true`."""
    rows = np.abs(found // columns - true // columns)
    return int(((rows <= reach) & (np.abs(found % columns - true % columns) <= reach)).sum())


def chance(true: np.ndarray, columns: int, reach: int) -> float:
    """How many of `true` int64 [m] a random choice finds within `reach`, expected."""
    place = np.arange(columns * columns)
    return sum(count_right(place, np.full_like(place, one), columns, reach) for one in true) / len(
        place
    )


def _pairs(
    source: Photos, size: int, threads: int
) -> Generator[tuple[Tensor, np.ndarray] | str, None, None]:
    """Views uint8 [2, 3, S, S] and DRAW [2] of each photo, or why there are none."""

    def cut(index: int) -> tuple[Tensor, np.ndarray] | str:
        try:
            image = Image.fromarray(source.pixels(index))
        except UnreadablePhoto as reason:
            return f"{source.name(index)}: {reason}"
        draws = draw_two(image, size, index)
        return cut_two(image, draws, size), draws

    return in_threads(cut, range(len(source)), threads or cores(), most=64)


def correspondence(args: argparse.Namespace, source: Photos, subject: Subject) -> dict[str, Scores]:
    """Shares in percent of all patches of all photos that both views show."""
    size, patch = args.image_size, subject.config["patch_size"]
    columns = size // patch
    total, right, expected = 0, np.zeros(2), np.zeros(2)
    print(f"correspondence: {subject.name}, {len(source)} photos", file=sys.stderr)
    with (
        progress("correspondence", len(source)) as advance,
        closing(_pairs(source, size, subject.how.threads)) as pairs,
    ):
        for pair in pairs:
            advance(1)
            if isinstance(pair, str):
                print(f"left out: {pair}", file=sys.stderr)
                continue
            places, true = true_places(pair[1], size, patch)
            with evaluating(subject.backbone), torch.inference_mode(), subject.how.autocast():
                tokens = subject.backbone(normalized(pair[0], subject.how.device))[:, 1:]
            check_finite(tokens)
            first, second = F.normalize(tokens.float(), dim=2)
            found = (first[places] @ second.T).argmax(dim=1).cpu().numpy()
            total += len(places)
            right += [count_right(found, true, columns, reach) for reach in (0, 1)]
            expected += [chance(true, columns, reach) for reach in (0, 1)]
    if not total:
        raise ValueError(f"--data {args.data}: no photo whose two views overlap could be read")
    names = ("accuracy", "accuracy_1", "chance", "chance_1")
    shares = 100 * np.concatenate([right, expected]) / total
    return {"correspondence": dict(zip(names, shares.tolist(), strict=True))}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, type=Path, help="photos: folder, tar or .beton")
    add("--image-size", type=int, help="side of a view (default: as the model was built for)")


TASK = FrozenTask(
    "correspondence",
    "Patches of a photo, found again in a second view of it.",
    add_options,
    ("data", "image_size"),
    lambda args, config: open_photos(args.data),
    correspondence,
    ("accuracy", "accuracy_1"),
)
main = TASK.main

if __name__ == "__main__":
    raise SystemExit(main())
