"""A run of fine-tuning: all that it holds, what of that a checkpoint keeps, how it resumes.

checkpoint.pt    the last one: backbone ("teacher"), classifier, optimizer, step, scores
best.pt          weights alone, of the epoch with the best top-1 so far
finetune.json    scores, in the form that `evaluation.report` reads
log.jsonl, config.json, run.json, tensorboard/    as in pre-training
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ibeton.evaluation.finetune.classifier import Classifier, build_classifier, classifier_state
from ibeton.evaluation.finetune.config import FinetuneConfig, resolved
from ibeton.evaluation.finetune.datasets import open_dataset
from ibeton.evaluation.finetune.loader import Loader, ViewSettings
from ibeton.evaluation.finetune.sets import LabeledSets, open_labeled
from ibeton.evaluation.finetune.steps import Mixer, build_optimizer, build_schedule
from ibeton.evaluation.finetune.subsets import few_labels
from ibeton.evaluation.photos import EVALUATION_VIEWS, PhotoViews
from ibeton.evaluation.trainable import precision_on, seed_all
from ibeton.model.checkpoint import load_checkpoint, save_checkpoint
from ibeton.training import checkpoints
from ibeton.training.health.nonfinite_guard import NonFiniteGuard, RunError
from ibeton.training.health.watchdog import Watchdog
from ibeton.training.run import fingerprint
from ibeton.training.run_folder import (
    RunFolder,
    changed,
    check_unused,
    identity,
    new_identity,
    read_config,
)

BEST = "best.pt"
# Settings that may change on the way: they do not change what is computed.
_FREE = {
    *("output_dir", "resume", "stop_after", "max_hours", "sweep", "checkpoint", "device"),
    *("train", "val", "root", "workers", "checkpoint_blocks", "eval_batch_size", "save_steps"),
    *("keep_last", "log_steps", "lost_after", "stall_after", "accumulate"),
}


@dataclass(frozen=True)
class Processes:
    """Where this process runs, and among how many."""

    device: torch.device
    rank: int
    world_size: int
    watchdog: Watchdog


@dataclass
class FinetuneRun:
    """Everything that a run holds. `step` counts the steps done, `scores` has one entry per epoch
    that was scored, `notes` are lines for the log's start."""

    config: FinetuneConfig
    backbone_config: dict[str, Any]
    here: Processes
    sets: LabeledSets
    loader: Loader
    views: PhotoViews
    classifier: Classifier
    model: nn.Module  # the classifier, or its DDP wrapper
    average: Any  # timm's ModelEmaV3, or None
    optimizer: torch.optim.Optimizer
    schedule: Any
    scaler: torch.amp.GradScaler | None
    mixer: Mixer
    guard: NonFiniteGuard
    precision: str
    group: int  # images that mix together
    step: int = 0
    name: str = ""
    seen: str = ""
    scores: list[dict[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * self.loader.steps_per_epoch

    @property
    def dtype(self) -> torch.dtype | None:
        return precision_on(self.here.device, self.precision)[1]

    def best(self) -> dict[str, float]:
        """The entry of `scores` with the highest top-1, the first of several; {} without any."""
        return max(self.scores, key=lambda one: one["top1"], default={})


def prepare(config: FinetuneConfig, content: dict[str, Any], here: Processes) -> FinetuneRun:
    """Open the data, build the classifier from the checkpoint's `content`, resume. Raises
    ValueError or FileNotFoundError, with a sentence for the user, before anything is written."""
    device, rank, world_size = here.device, here.rank, here.world_size
    own, group = config.shares(world_size)
    precision = precision_on(device, config.precision)[0]
    size = config.image_size or int(content["config"]["image_size"])
    patch = int(content["config"]["patch_size"])
    if size % patch:
        raise ValueError(f"--image-size {size} is not a multiple of the backbone's patch, {patch}")
    sets = open_sets(config)
    settings = ViewSettings(size, config.scale, config.augment, config.seed, config.repeats)
    pinned = device.type == "cuda"
    loader = Loader(sets.train, settings, own, rank, world_size, config.workers, pinned)
    seed_all(config.seed)  # the same weights on every rank
    classifier = build_classifier(config, content, len(sets.classes)).to(device)
    optimizer = build_optimizer(classifier, config)
    scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
    run = FinetuneRun(
        config,
        content["config"],
        here,
        sets,
        loader,
        PhotoViews(sets.val, size, EVALUATION_VIEWS[config.test_interpolation]),
        classifier,
        classifier,
        _average(classifier, config),
        optimizer,
        build_schedule(optimizer, config, loader.steps_per_epoch),
        scaler,
        Mixer(config, len(sets.classes), device),
        NonFiniteGuard(scaler is not None),
        precision,
        group,
    )
    _resume(run)
    if world_size > 1:
        run.model = DistributedDataParallel(
            classifier,
            [device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    return run


def open_sets(config: FinetuneConfig) -> LabeledSets:
    """The labeled sets that the settings name, with --labels only these photos to train on."""
    if config.dataset:
        sets = open_dataset(config.dataset, config.root)
    else:
        sets = open_labeled(config.train, config.val)
    if config.labels:
        few = few_labels(sets.train, config.labels, config.label_seed)
        sets = LabeledSets(few, sets.val, sets.classes)
    return sets


def _average(classifier: Classifier, config: FinetuneConfig) -> Any:
    if not config.ema:
        return None
    from timm.utils import ModelEmaV3

    return ModelEmaV3(classifier, config.ema)


def lock_run_folder(run: FinetuneRun) -> RunFolder:
    """The run's folder, from now on held by this process. Raises ValueError, see `RunFolder`."""
    begins = {"step": run.step, "processes": run.here.world_size}
    begins["steps_per_epoch"] = run.loader.steps_per_epoch
    settings = {"arch": run.backbone_config["arch"], **resolved(run.config)}
    return RunFolder(run.folder, run.name, run.seen, settings, begins)


def _weights(run: FinetuneRun) -> dict[str, Any]:
    """What `load_classifier` and everything that reads a backbone want."""
    return {
        **classifier_state(run.classifier),
        "ema": run.average.module.state_dict() if run.average is not None else None,
        "config": run.backbone_config,
        "finetune": {**resolved(run.config), "image_size": run.views.size},
        "classes": run.sets.classes,
        "step": run.step,
        "scores": run.scores,
    }


def save(run: FinetuneRun, best: bool = False) -> None:
    """Write the checkpoint, on rank 0; with `best` its weights as best.pt, first. Raises RunError
    where it cannot."""
    if run.here.rank:
        return
    weights = _weights(run)
    content = {
        **weights,
        "optimizer": run.optimizer.state_dict(),
        "fp16_scaler": run.scaler.state_dict() if run.scaler else None,
        "steps_per_epoch": run.loader.steps_per_epoch,
        "data": fingerprint(run.sets.train),
        "guard": run.guard.state(),
        "run": run.name,
    }
    try:
        if best:
            save_checkpoint(run.folder / BEST, weights)
        checkpoints.write(run.folder, content, run.config.keep_last)
    except OSError as error:
        raise RunError(f"no checkpoint could be written at step {run.step} ({error})") from error


def _resume(run: FinetuneRun) -> None:
    """Start, or continue from the run folder's checkpoint; never mix two runs in a folder."""
    rank, resuming = run.here.rank, run.config.resume == "auto"
    run.seen = identity(run.folder) if rank == 0 else ""
    if not resuming and rank == 0:
        check_unused(run.folder)
    path = None
    if resuming:
        path, damaged = checkpoints.newest_of_rank_0(run.folder, run.here.device)
        run.notes += damaged
    run.name = run.seen or new_identity()
    if path is None:
        if run.seen and (other := _changed(run, read_config(run.folder))):
            raise ValueError(
                f"{run.folder} holds a run of other settings ({other}): give another --output-dir"
            )
        return
    content = load_checkpoint(path)
    _check_same(run, path, content)
    run.classifier.load_state_dict({**content["teacher"], **content["classifier"]})
    if run.average is not None:
        run.average.module.load_state_dict(content["ema"])
    run.optimizer.load_state_dict(content["optimizer"])
    if run.scaler is not None and content["fp16_scaler"]:
        run.scaler.load_state_dict(content["fp16_scaler"])
    run.guard.restore(content["guard"], content["step"])
    run.step, run.scores = content["step"], content["scores"]
    run.notes.append(f"resumed at step {run.step} of {run.steps} from {path}")


def _check_same(run: FinetuneRun, path: Path, content: dict[str, Any]) -> None:
    if "classifier" not in content or "optimizer" not in content:
        raise ValueError(f"{path} is not a checkpoint of fine-tuning: give another --output-dir")
    if other := _changed(run, content["finetune"]):
        raise ValueError(
            f"checkpoint {path} is of a run with other settings ({other}): give the same, or"
            " another --output-dir"
        )
    if content["config"] != run.backbone_config:
        raise ValueError(
            f"checkpoint {path} was fine-tuned from a backbone with other settings than"
            f" {run.config.checkpoint}: give that one, or another --output-dir"
        )
    if content["classes"] != run.sets.classes or content["data"] != fingerprint(run.sets.train):
        raise ValueError(
            f"checkpoint {path} was trained on other photos: give the same, or another --output-dir"
        )


def _changed(run: FinetuneRun, before: dict[str, Any]) -> str:
    """The settings of another start of the run that differ and matter, see `changed`."""
    free = _FREE if run.config.image_size else {*_FREE, "image_size"}
    return changed(before, resolved(run.config), free)
