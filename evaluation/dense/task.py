"""What a dense task gives to the training loop: a model, samples, scores and pictures.

Draws depend only on (seed, step, place in the batch), so that neither the number of workers nor
that of processes changes them, and a killed run resumes exactly.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils.data import Dataset

from ibeton.evaluation.dense.config import DenseConfig
from ibeton.evaluation.trainable import layers_of, trainable_backbone
from ibeton.model.checkpoint import load_backbone
from ibeton.model.config import ModelConfig
from ibeton.options import fill
from ibeton.progress import progress

Scores = dict[str, float]


@dataclass(frozen=True)
class Place:
    """The device, rank and number of processes."""

    device: torch.device
    rank: int
    world_size: int

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This rank's part of `items`."""
        return items[self.rank :: self.world_size]

    def gathered(self, own: Any) -> list[Any]:
        """What each rank gives, on rank 0; [] on the others. All ranks must call."""
        if self.world_size == 1:
            return [own]
        parts: list[Any] = [None] * self.world_size if self.rank == 0 else []
        dist.gather_object(own, parts or None)
        return parts


class BadSample(str):
    """Why a sample cannot be used, in a sentence that names its file."""


class Photos(Protocol):
    """What a task trains on; `names` are the files'."""

    names: list[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Any, Any]:
        """A photo and its truth. Raises ValueError or OSError that names the file."""


class Samples(Dataset):
    """Views of photos as a data set for workers, each with a seed for what the model draws. The
    random state of a sample is its own, and what is wrong with a file arrives as a `BadSample`,
    without the worker's traceback."""

    def __init__(self, photos: Photos, view: Callable[[Any, Any], Any], seed: int) -> None:
        self.photos, self.view, self.seed = photos, view, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, draw = key
        state = int(np.random.SeedSequence([self.seed, draw]).generate_state(1, np.uint64)[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(state)
            try:
                return self.view(*self.photos.read(index)), state // 2
            except (ValueError, OSError) as error:
                return BadSample(error)


def keys(
    photos: int, batch_size: int, seed: int, first: int, last: int, place: Place
) -> Iterator[list[tuple[int, int]]]:
    """(photo, draw) of this rank for steps `first` to `last`: every photo once per epoch, and the
    whole batch the same however many ranks share it."""
    order, epoch = np.empty(0, np.int64), -1
    for step in range(first, last):
        batch = []
        for draw in range(step * batch_size, (step + 1) * batch_size):
            if draw // photos != epoch:
                epoch = draw // photos
                order = np.random.default_rng([seed, epoch]).permutation(photos)
            batch.append((int(order[draw % photos]), draw))
        yield list(place.share(batch))


class Task(ABC):
    """A dense task to train. `model(batch, draws)` gives named losses, of which "loss" is
    minimized, with a seed for each sample in `draws`, and `model.pyramid.backbone` is the backbone;
    `view(photo, truth)` gives a sample, in worker processes, drawing from torch's generator;
    `steps` is the length. `photos` are trained on, and `val` evaluated."""

    model: Any
    backbone_config: dict[str, Any]
    photos: Photos
    val: Any  # Photos, with what the task further needs
    view: Callable[[Any, Any], Any]
    steps: int

    @abstractmethod
    def factor(self, step: int) -> float:
        """What the peak learning rate is multiplied by, after the warm-up."""

    @staticmethod
    @abstractmethod
    def collate(samples: list[Any]) -> Any:
        """A batch of samples, in worker processes."""

    @abstractmethod
    def evaluate(self, place: Place) -> Scores:
        """Scores in percent, on rank 0; {} on the others. All ranks must call."""

    @abstractmethod
    def picture(self, index: int, device: torch.device, folder: Path) -> Any:
        """A figure of a photo of `val`, its truth and the prediction beside each other; a task may
        write more into `folder`."""


def watched(place: Place, photos: int) -> Iterator[int]:
    """This rank's photos of `photos`, under a progress line of rank 0."""
    mine = place.share(range(photos))
    if place.rank:
        yield from mine
        return
    with progress("evaluation", len(mine)) as advance:
        for index in mine:
            yield index
            advance(1)


def load_trunk(config: DenseConfig) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone to train, with stochastic depth, and its run's settings. Raises as
    `load_backbone`."""
    trained, settings = load_backbone(config.checkpoint, config.network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = trainable_backbone(fill(ModelConfig, settings), config.drop_path)
    fc_norm = getattr(backbone, "fc_norm", None)
    if fc_norm is not None:  # of the class output alone
        fc_norm.requires_grad_(False)
    if not config.untrained:
        trained.masked_embed = None  # type: ignore[assignment]
        backbone.load_state_dict(trained.state_dict())
    return backbone, settings


def parameter_groups(model: nn.Module, weight_decay: float, decay: float) -> list[dict[str, Any]]:
    """AdamW's groups under timm's layer decay: embeddings first, then blocks, then all else,
    which no pattern matches, at the full rate. Biases, norms and other vectors do not decay."""
    model.group_matcher = lambda coarse: layers_of(r"pyramid\.backbone")  # type: ignore[assignment]
    try:
        return param_groups_layer_decay(model, weight_decay, layer_decay=decay)
    finally:
        del model.group_matcher


def batch_of(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    """A batch by `collate` and its seeds, unless a sample is bad: then that one."""
    bad = [sample for sample in samples if isinstance(sample, BadSample)]
    if bad:
        return bad[0]
    views, draws = zip(*samples, strict=True)
    return collate(list(views)), list(draws)
