"""The state of a run, how it is saved in checkpoints, and how training resumes from them."""

import hashlib
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ibeton.model import IBOT
from ibeton.model.checkpoint import (
    check_same_model,
    load_weights_into,
    model_state,
    restore_model,
    write_backbone,
)
from ibeton.model.cuda_graph import GraphedStep
from ibeton.model.optim import load_optimizer_state, optimizer_state
from ibeton.model.schedules import cosine_schedule
from ibeton.pipeline import Loader
from ibeton.pipeline.store.decode import UnreadablePhoto
from ibeton.pipeline.store.photos import Photos
from ibeton.training import checkpoints
from ibeton.training.config import Config
from ibeton.training.health.collapse import CollapseAlarm, patience
from ibeton.training.health.nonfinite_guard import NonFiniteGuard, RunError
from ibeton.training.health.watchdog import Watchdog
from ibeton.training.log.curves import model_facts
from ibeton.training.run_folder import (
    RunFolder,
    changed,
    check_unused,
    identity,
    new_identity,
    read_config,
)

_PROBES = 16  # photos compared when a run resumes
# Settings that may change between starts without a note: they do not change what is computed.
_FREE = {
    *("output_dir", "resume", "init_from", "stop_after", "max_hours", "device", "recipe"),
    *("save_steps", "keep_every", "keep_last", "log_steps", "profile", "lost_after", "stall_after"),
    *("eval_train", "eval_val", "eval_every", "eval_k"),
    *("data", "loader", "crops_on", "batch_size", "global_batch_size", "workers", "batches_ahead"),
    *("micro_steps", "checkpoint_blocks", "recompute", "kernels", "cuda_graphs", "shard_optimizer"),
}


@dataclass
class Run:
    """Everything that a run holds.

    `step`: steps done since the start of training. `seen`: name of the run that the folder belonged
    to at start-up. `notes`: lines for the start of the log. `saved`: step of the last save since
    the run was last restored, or of the checkpoint if it showed signs of collapse; -1 for none.
    `save_deferred`: a save was due and not allowed.
    """

    config: Config
    device: torch.device
    rank: int
    world_size: int
    loader: Loader
    ibot: IBOT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    precision: str
    watchdog: Watchdog
    graphed_step: GraphedStep | None = None  # None: steps run eagerly
    step: int = 0
    name: str = ""
    seen: str = ""
    notes: list[str] = field(default_factory=list)
    saved: int = -1
    save_deferred: bool = False

    def __post_init__(self) -> None:
        per_epoch, model = self.loader.steps_per_epoch, self.config.model
        prototypes = (model.out_dim, model.patch_prototypes())
        weights = (model.lambda1, model.lambda2)
        uniform = sum(w * math.log(k) for w, k in zip(weights, prototypes, strict=True))
        self.guard = NonFiniteGuard(self.scaler is not None, uniform)
        lasts = patience(self.steps, per_epoch)
        images = self.config.pipeline.batch_size // model.micro_steps
        self.alarm = CollapseAlarm(model.out_dim, model.lambda1, lasts, images)

    @property
    def folder(self) -> Path:
        return Path(self.config.run.output_dir)

    @property
    def global_batch(self) -> int:
        return self.config.pipeline.batch_size * self.world_size

    @property
    def steps(self) -> int:
        """Steps of the whole run, which its schedules span."""
        return self.config.run.epochs * self.loader.steps_per_epoch

    @property
    def last(self) -> int:
        """Where training ends: the step of --epochs or of --stop-after."""
        return min(self.steps, self.config.run.stop_after or self.steps)


class RateSchedule:
    """Learning rate, weight decay and teacher momentum of every step, by name."""

    def __init__(self, **rates: NDArray[np.float64]) -> None:
        self._rates = rates

    def __getitem__(self, step: int) -> dict[str, float]:
        return {name: float(values[step]) for name, values in self._rates.items()}


def rate_schedule(run: Run) -> RateSchedule:
    """The rates of every step of the run."""
    options, per_epoch = run.config.run, run.loader.steps_per_epoch
    peak = options.lr * run.global_batch / 256
    lr = cosine_schedule(peak, options.min_lr, options.epochs, per_epoch, options.warmup_epochs)
    decays = options.weight_decay, options.weight_decay_end
    decay = cosine_schedule(*decays, options.epochs, per_epoch)
    momentum = cosine_schedule(options.momentum_teacher, 1.0, options.epochs, per_epoch)
    return RateSchedule(lr=lr, weight_decay=decay, momentum=momentum)


def seed_step(run: Run, step: int) -> None:
    """Seed torch from (seed, step, rank), so that stochastic depth draws the same in a resumed run
    as in an unbroken one."""
    entropy = np.random.SeedSequence([run.config.pipeline.seed, step, run.rank])
    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def lock_run_folder(run: Run) -> RunFolder:
    """The run's folder, locked by this process. Raises ValueError, see `RunFolder`."""
    begins = {"step": run.step, "processes": run.world_size}
    begins["steps_per_epoch"] = run.loader.steps_per_epoch
    return RunFolder(run.folder, run.name, run.seen, run.config.resolved(), begins)


def try_save(run: Run) -> bool:
    """Save, unless the last steps were skipped or a tensor is not finite; then returns False, and
    the save is due again after the next good step. All ranks take part. Raises RunError if the
    checkpoint cannot be written."""
    run.save_deferred = True
    if run.guard.in_streak:
        return False
    if not is_finite(run):
        run.guard.spoil(run.step - 1)
        return False
    save(run)
    run.save_deferred = False
    return True


def is_finite(run: Run) -> bool:
    """Whether all weights, centers, statistics and optimizer state are finite on every rank. One
    pass over memory on the device, one synchronization."""
    optimizer: Any = getattr(run.optimizer, "optim", run.optimizer)  # of this rank, if sharded
    states = [run.ibot.state_dict(), *optimizer.state.values()]
    tensors: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in itertools.chain.from_iterable(state.values() for state in states):
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
            tensors.setdefault(tensor.device, []).append(tensor)
    ok = torch.ones((), device=run.device)
    for same in tensors.values():  # the maximum is NaN or infinite if one value is
        largest = torch.stack(torch._foreach_norm([t.detach() for t in same], math.inf))
        ok *= largest.isfinite().all().to(run.device)
    if run.world_size > 1:
        dist.all_reduce(ok, dist.ReduceOp.MIN)
    return bool(ok > 0)


def save(run: Run) -> None:
    """Write the checkpoint; every --keep-every epochs also one that is kept. All ranks take part,
    rank 0 writes. Raises RunError if it cannot.

    Checkpoints saved after losses became implausible, or the run began to look collapsed, overwrite
    each other, so that they do not push out good ones. The state of the RNG is (seed, step), see
    `seed_step`.
    """
    optimizer = optimizer_state(run.optimizer)
    sound = min(run.guard.last_good, run.alarm.last_sound)
    replace, run.saved = run.saved > sound, run.step
    if run.rank:
        return
    options, per_epoch = run.config.run, run.loader.steps_per_epoch
    epoch = run.step // per_epoch  # the next one
    content = {
        **model_state(run.ibot),
        "optimizer": optimizer,
        "fp16_scaler": run.scaler.state_dict() if run.scaler else None,
        "step": run.step,
        "epoch": epoch,
        "rng": {"seed": run.config.pipeline.seed, "step": run.step},
        "steps_per_epoch": per_epoch,
        "global_batch": run.global_batch,
        "data": fingerprint(run.loader.photos),
        "guard": run.guard.state(),
        "alarm": run.alarm.state(),
        "run": run.name,
        "config": run.config.resolved(),
    }
    checkpoints.write(run.folder, content, options.keep_last, kept_epoch(run), replace)
    export_backbones(run)


def kept_epoch(run: Run) -> int | None:
    """The epoch that the present step ends, if its checkpoint is kept by --keep-every."""
    keep, (epoch, rest) = run.config.run.keep_every, divmod(run.step, run.loader.steps_per_epoch)
    return epoch if keep and epoch and not rest and epoch % keep == 0 else None


def export_backbones(run: Run) -> None:
    """Write the backbone files that are due at this step. Their cards have the scores that the log
    holds by now."""
    if (epoch := kept_epoch(run)) is not None:
        export_backbone(run, epoch)
    if run.step == run.steps:
        export_backbone(run, None)


def export_backbone(run: Run, epoch: int | None) -> None:
    """Write the teacher's backbone with a model card: as backbone0040.safetensors after `epoch` 40,
    as backbone.safetensors (None) at the end. Raises RunError if it cannot be written."""
    name = "backbone" if epoch is None else f"backbone{epoch:04d}"
    facts = model_facts(run.folder, run.step, run.loader.steps_per_epoch)
    names = ", ".join(Path(path).name for path in run.config.pipeline.data)
    facts["photos"] = f"{len(run.loader.photos):,} of {names}"
    facts["images per step"] = f"{run.world_size * run.config.pipeline.batch_size:,}"
    facts["recipe"] = run.config.run.recipe or run.config.model.arch
    # The card lists what shapes the weights.
    unlisted = _FREE | {"log_to"} | ({"patch_out_dim"} if run.config.model.shared_head else set())
    path = run.folder / f"{name}.safetensors"
    try:
        write_backbone(path, run.ibot.teacher.backbone, run.config.resolved(), facts, unlisted)
    except OSError as error:
        raise RunError(f"{path} could not be written ({error})") from error


def resume(run: Run) -> None:
    """Start, or resume from the checkpoint that --resume names; never mix two runs in a folder.

    All ranks use the checkpoint that rank 0 finds. Raises ValueError or FileNotFoundError.
    """
    options = run.config.run
    run.seen = identity(run.folder) if run.rank == 0 else ""
    if options.resume == "no" and run.rank == 0:
        check_unused(run.folder)
    path: Path | None = Path(options.resume)
    if options.resume == "auto":
        path, damaged = checkpoints.newest_of_rank_0(run.folder, run.device)
        run.notes += damaged
    if options.resume == "no" or path is None:
        run.name = run.seen or new_identity()
        # The folder's run, if any, has no checkpoint yet.
        if run.seen and (differ := changed(read_config(run.folder), run.config.resolved(), _FREE)):
            raise ValueError(
                f"{run.folder} holds a run with other settings, without a checkpoint yet"
                f" ({differ}): give another --output-dir, or remove it"
            )
        if options.init_from:
            fresh = load_weights_into(run.ibot, options.init_from)
            new = f"; heads and {', '.join(fresh)} are new" if fresh else "; the heads are new"
            run.notes.append(f"student and teacher start from {options.init_from}{new}")
        return
    restore(run, path, checkpoints.load_sound(path))
    run.name = run.seen or new_identity()  # in another folder it is another run
    run.notes.append(
        f"resumed at step {run.step} (epoch {run.step // run.loader.steps_per_epoch}) from {path}"
    )


def restore(run: Run, path: Path, content: dict[str, Any]) -> None:
    """Return the run to the state of the checkpoint at `path`. Raises ValueError, with nothing
    changed, if it is of another model, optimizer, data set, global batch, seed or folder."""
    _check_same(run, path, content)
    restore_model(run.ibot, content)
    load_optimizer_state(run.optimizer, content["optimizer"])
    if run.scaler is not None and content["fp16_scaler"]:
        run.scaler.load_state_dict(content["fp16_scaler"])
    run.step = content["step"]
    run.guard.restore(content.get("guard", {}), run.step)
    run.alarm.restore(content.get("alarm", {}))
    run.saved = run.step if run.step > run.alarm.last_sound else -1
    run.save_deferred = False


def _check_same(run: Run, path: Path, content: dict[str, Any]) -> None:
    if "optimizer" not in content:
        raise ValueError(
            f"--resume {path}: it holds only weights, no run to continue; start a run from them"
            f" with --init-from {path}"
        )
    config = run.config.resolved()
    check_same_model(path, content["config"], config)
    if (before := content["config"].get("optimizer", "adamw")) != config["optimizer"]:
        raise ValueError(
            f"checkpoint {path} was written with --optimizer {before}, this run has"
            f" {config['optimizer']}, whose state differs: keep --optimizer {before}, or start a"
            f" new run from its weights with --init-from {path}"
        )
    saved = (content["steps_per_epoch"], content["global_batch"])
    now = (run.loader.steps_per_epoch, run.global_batch)
    if saved != now:
        raise ValueError(
            f"checkpoint {path} has {saved[0]} steps per epoch of {saved[1]} images, this run"
            f" {now[0]} of {now[1]}: keep --data and --batch-size times processes as they were"
        )
    seed = content["rng"]["seed"]
    if seed != config["seed"]:
        raise ValueError(
            f"checkpoint {path} has --seed {seed}, this run {config['seed']}: some photos would be"
            " seen twice and others not at all; give the same seed"
        )
    photos = fingerprint(run.loader.photos)  # "": a photo that could not be read, then or now
    if any(a and b and a != b for a, b in zip(content.get("data") or photos, photos, strict=True)):
        raise ValueError(
            f"checkpoint {path} was trained on other photos than --data {' '.join(config['data'])}:"
            " give the same, or start a run from its weights with --init-from"
        )
    owner = content.get("run")
    if run.seen and owner and owner != run.seen:
        raise ValueError(
            f"checkpoint {path} is of another run than {run.folder}: give another --output-dir"
        )
    if differ := changed(content["config"], config, _FREE):
        run.notes.append(f"settings that differ from the start of the run: {differ}")


def fingerprint(photos: Photos) -> list[str]:
    """Hashes that identify a data set, whatever stores it: of its labels and of some photos; ""
    for a photo that cannot be read."""
    words = [hashlib.sha256(photos.labels.tobytes()).hexdigest()]
    for index in np.linspace(0, len(photos) - 1, _PROBES).astype(int):
        try:
            words.append(hashlib.sha256(photos.photo_bytes(int(index))).hexdigest())
        except UnreadablePhoto:
            words.append("")
    return words
