"""A run of fine-tuning: all that it holds, what of that a checkpoint keeps, how it resumes.

checkpoint.pt    the last one: backbone ("teacher"), classifier, optimizer, step, scores
best.pt          weights alone, of the epoch with the best top-1 so far
finetune.json    scores, in the form that `evaluation.report` reads
log.jsonl, config.json, run.json, tensorboard/    as in pre-training
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ibeton.evaluation.finetune.classifier import build_classifier, classifier_state
from ibeton.evaluation.finetune.config import FinetuneConfig
from ibeton.evaluation.finetune.datasets import open_dataset
from ibeton.evaluation.finetune.loader import Loader, ViewSettings
from ibeton.evaluation.finetune.sets import LabeledSets, open_labeled
from ibeton.evaluation.finetune.steps import Mixer, build_optimizer, build_schedule
from ibeton.evaluation.finetune.subsets import few_labels
from ibeton.evaluation.networks import view_size
from ibeton.evaluation.photos import (
    EVALUATION_VIEWS,
    PhotoViews,
    check_classes,
    note_if_same,
)
from ibeton.evaluation.trainable import precision_on, seed_all
from ibeton.model.checkpoint import load_checkpoint, save_checkpoint
from ibeton.training import checkpoints
from ibeton.training.health.nonfinite_guard import NonFiniteGuard, RunError
from ibeton.training.health.watchdog import Watchdog
from ibeton.training.problems import check_readable
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


class FinetuneRun:
    """Everything that a run holds. `step` counts the steps done, `scores` has one entry per epoch
    that was scored, `notes` are lines for the log's start.

    Opens the data, builds the classifier from the checkpoint's `content`, resumes. Raises
    ValueError or FileNotFoundError, with a sentence for the user, before anything is written.
    """

    def __init__(self, config: FinetuneConfig, content: dict[str, Any], here: Processes) -> None:
        self.config, self.here = config, here
        self.backbone_config: dict[str, Any] = content["config"]
        device, world_size = here.device, here.world_size
        own, self.group = config.shares(world_size)  # `group` images mix together
        self.precision, self.dtype = precision_on(device, config.precision)
        size = view_size(config.image_size, self.backbone_config)
        self.sets = open_sets(config)
        classes = len(self.sets.classes)
        check_classes(classes, config.train or config.dataset, config.val or config.root)
        check_readable(self.sets.val, config.val or f"{config.dataset} in {config.root}")
        settings = ViewSettings(size, config.scale, config.augment, config.seed, config.repeats)
        ranks, on_gpu = (here.rank, world_size), device.type == "cuda"
        self.loader = Loader(self.sets.train, settings, own, *ranks, config.workers, on_gpu)
        self.views = PhotoViews(self.sets.val, size, EVALUATION_VIEWS[config.test_interpolation])
        seed_all(config.seed)  # the same weights on every rank
        self.classifier = build_classifier(config, content, classes).to(device)
        self.model: nn.Module = self.classifier  # or its DDP wrapper
        self.average: Any = None  # timm's ModelEmaV3 with --ema
        if config.ema:
            from timm.utils import ModelEmaV3

            self.average = ModelEmaV3(self.classifier, config.ema)
        self.optimizer = build_optimizer(self.classifier, config)
        self.schedule = build_schedule(self.optimizer, config, self.loader.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.mixer = Mixer(config, classes, device)
        self.guard = NonFiniteGuard(self.scaler.is_enabled())
        self.step, self.name, self.seen = 0, "", ""
        self.scores: list[dict[str, float]] = []
        same = "" if config.dataset else note_if_same(config.train, config.val)
        self.notes = [same] if same else []
        _resume(self)
        if world_size > 1:
            self.model = DistributedDataParallel(
                self.classifier,
                [device] if on_gpu else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * self.loader.steps_per_epoch

    def best(self) -> dict[str, float]:
        """The entry of `scores` with the highest top-1, the first of several; {} without any."""
        return max(self.scores, key=lambda one: one["top1"], default={})


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


def lock_run_folder(run: FinetuneRun) -> RunFolder:
    """The run's folder, from now on held by this process. Raises ValueError, see `RunFolder`."""
    begins = {"step": run.step, "processes": run.here.world_size}
    begins["steps_per_epoch"] = run.loader.steps_per_epoch
    settings = {"arch": run.backbone_config["arch"], **asdict(run.config)}
    return RunFolder(run.folder, run.name, run.seen, settings, begins)


def save(run: FinetuneRun, best: bool = False) -> None:
    """Write the checkpoint, on rank 0; with `best` its weights as best.pt, first. Raises RunError
    where it cannot."""
    if run.here.rank:
        return
    weights = {
        **classifier_state(run.classifier),
        "ema": run.average.module.state_dict() if run.average is not None else None,
        "config": run.backbone_config,
        "finetune": {**asdict(run.config), "image_size": run.views.size},
        "classes": run.sets.classes,
        "step": run.step,
        "scores": run.scores,
    }
    content = {
        **weights,
        "optimizer": run.optimizer.state_dict(),
        "fp16_scaler": run.scaler.state_dict() or None,
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
    if content["fp16_scaler"]:
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
    return changed(before, asdict(run.config), free)
