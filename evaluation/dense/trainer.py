"""Training of a dense task: steps, evaluations, checkpoints and how a run resumes."""

import dataclasses
import hashlib
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from ibeton.evaluation.dense.config import DenseConfig
from ibeton.evaluation.dense.sync_norm import synchronize
from ibeton.evaluation.dense.task import (
    BadSample,
    Place,
    Samples,
    Scores,
    Task,
    batch_of,
    keys,
    parameter_groups,
)
from ibeton.evaluation.trainable import precision_on, seed_all
from ibeton.model.checkpoint import load_checkpoint
from ibeton.training import checkpoints
from ibeton.training.health.nonfinite_guard import IN_A_ROW, RunError
from ibeton.training.health.stop_signals import StopSignals
from ibeton.training.log.run_log import RunLog
from ibeton.training.run_folder import changed, check_unused, identity
from ibeton.workers import end_with_parent

# Settings that may change when a run resumes: they do not change what is computed. The precision
# does, but an evaluation that overflows must be repeatable with another.
_FREE = {
    *("output_dir", "resume", "device", "workers", "save_steps", "log_steps", "eval_every"),
    *("pictures", "max_hours", "data", "checkpoint", "precision"),
}

LEAST_SCALE = 2.0**-10  # of losses: it starts at 2**16, and halves with each overflow


class Training:
    """A run of a task: model, optimizer, step, and what a checkpoint keeps of them. `seen`: on rank
    0 the name of the run that --output-dir holds; `note`: a line for the start of the log."""

    def __init__(self, task: Task, config: DenseConfig, place: Place) -> None:
        self.task, self.config, self.place, self.step = task, config, place, 0
        self.seen = self.note = ""
        precision, self.dtype = precision_on(place.device, config.precision)
        if config.batch_size % place.world_size:
            raise ValueError(
                f"--batch-size {config.batch_size} does not divide by {place.world_size} processes"
            )
        self.model = task.model.to(place.device)
        if place.world_size > 1:  # before the optimizer, as it replaces batch norms
            synchronize(self.model, place.device)
        groups = parameter_groups(self.model, config.weight_decay, config.layer_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=precision == "fp16")
        self.skips = torch.zeros((), device=place.device)  # steps in a row without a finite loss
        self.call: nn.Module = self.model
        if place.world_size > 1:
            ids = [place.device] if place.device.type == "cuda" else None
            self.call = nn.parallel.DistributedDataParallel(
                self.model, device_ids=ids, broadcast_buffers=False
            )

    def rate(self, step: int) -> float:
        """Learning rate of the head at `step`."""
        warmup = min(1.0, (step + 1) / max(1, self.config.warmup_steps))
        return self.config.lr * warmup * self.task.factor(step)

    def train_step(self, batch: Any) -> dict[str, Tensor]:
        """One step on this rank's batch and its seeds; the named losses, on the device."""
        seed_all(self.config.seed, self.step, self.place.rank)  # for stochastic depth
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step) * group["lr_scale"]
        self.model.train()
        move = partial(Tensor.to, device=self.place.device, non_blocking=True)
        with self.autocast():
            losses = self.call(*tree_map_only(Tensor, move, batch))
        finite = losses["loss"].detach().isfinite()
        self.skips = torch.where(finite, torch.zeros_like(self.skips), self.skips + 1)
        self.scaler.scale(losses["loss"]).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        return {name: loss.detach() for name, loss in losses.items()}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.place.device.type, self.dtype, enabled=self.dtype is not None)

    def evaluate(self) -> Scores:
        """The task's scores, on rank 0. All ranks must call."""
        self.model.eval()
        with torch.inference_mode(), self.autocast():
            return self.task.evaluate(self.place)

    def draw(self) -> None:
        """Pictures into --output-dir, on rank 0."""
        from ibeton.evaluation.pictures import canvas

        out = Path(self.config.output_dir)
        (out / "pictures").mkdir(exist_ok=True)
        self.model.eval()
        for index in canvas.spread(self.task.val, self.config.pictures):
            with torch.inference_mode(), self.autocast():
                figure = self.task.picture(index, self.place.device, out)
            name = Path(self.task.val.names[index])
            canvas.save(figure, out / "pictures" / f"{name.stem}.png", name.name)

    def loader(self) -> DataLoader:
        """Batches of this rank from the current step on."""
        config, workers = self.config, self.config.workers
        ahead = {"prefetch_factor": 4, "multiprocessing_context": "forkserver"} if workers else {}
        return DataLoader(
            Samples(self.task.photos, self.task.view, config.seed),
            batch_sampler=keys(
                *(len(self.task.photos), config.batch_size, config.seed),
                *(self.step, self.task.steps, self.place),
            ),  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=partial(batch_of, self.task.collate),
            worker_init_fn=end_with_parent,
            pin_memory=self.place.device.type == "cuda",
            **cast(Any, ahead),
        )

    def content(self) -> dict[str, Any]:
        """A checkpoint; its backbone is read by every command as that of a teacher."""
        backbone = cast(Any, self.model).pyramid.backbone.state_dict()
        return {
            "teacher": {f"backbone.{name}": tensor for name, tensor in backbone.items()},
            "config": self.task.backbone_config,
            "dense": dataclasses.asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "photos": self.digest(),
        }

    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.task.photos.names).encode()).hexdigest()

    def resume(self) -> None:
        """Continue from the newest checkpoint of --output-dir where --resume auto asks for it.
        Raises ValueError where that run had other settings or photos."""
        folder = Path(self.config.output_dir)
        if self.place.rank == 0:
            self.seen = identity(folder)
            if self.config.resume == "no":
                check_unused(folder)
        if self.config.resume == "no":
            return
        path, damaged = checkpoints.newest_of_rank_0(folder, self.place.device)
        if path is None:
            return
        content = load_checkpoint(path)
        if "dense" not in content:
            raise ValueError(f"{path} is not of this command: give another --output-dir")
        other = changed(content["dense"], dataclasses.asdict(self.config), _FREE)
        if other or content["photos"] != self.digest():
            raise ValueError(
                f"{path} is of a run with other settings or photos"
                f" ({other or 'the photos in --data'}): give the same, or another --output-dir"
            )
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        if content["scaler"]:  # empty where the run had another precision
            self.scaler.load_state_dict(content["scaler"])
        self.step = content["step"]
        self.note = "; ".join([*damaged, f"resumed at step {self.step} from {path}"])


def train(run: Training, log: RunLog | None, stops: StopSignals) -> bool:
    """All steps, with checkpoints and evaluations on the way; False where asked to stop before."""
    config, last, started, first = run.config, run.task.steps, time.monotonic(), run.step
    for batch in run.loader():
        if isinstance(batch, BadSample):
            raise ValueError(str(batch))
        losses = run.train_step(batch)
        if run.step % config.log_steps == 0 or run.step == last:
            record = over_ranks(losses, run.place.world_size)
            check_finite(run, record["loss"])
            per_s = (run.step - first) * config.batch_size / (time.monotonic() - started)
            record |= {"lr": run.rate(run.step - 1), "images_per_s": per_s}
            if log is not None:
                log.record({"step": run.step - 1, **record})
                log.show(run.step, f"loss {record['loss']:.3f}  {per_s:.1f} images/s")
        stop = stops.requested_on_any_rank(run.place.device)
        if stop or run.step % config.save_steps == 0 or run.step == last:
            save(run)
        if stop and run.step < last:
            return False
        if config.eval_every and run.step % config.eval_every == 0 and run.step < last:
            report(run.evaluate(), run.step, log)
    return True


def check_finite(run: Training, loss: float) -> None:
    """Raise RunError if the run learns nothing any more: by a `loss` that is not finite, with loss
    scaling on some rank in some steps in a row, or by gradients that are not finite at any loss
    scale. All ranks must call it."""
    scaled, skips = run.scaler.is_enabled(), run.skips.clone()
    if run.place.world_size > 1:
        dist.all_reduce(skips, dist.ReduceOp.MAX)
    if skips >= IN_A_ROW or not (scaled or np.isfinite(loss)):
        raise RunError(f"the loss is {loss} at step {run.step}: lower --lr, or --precision fp32")
    if scaled and run.scaler.get_scale() < LEAST_SCALE:
        raise RunError(
            f"gradients are not finite at step {run.step}, however small the loss scale:"
            " lower --lr, or give --precision fp32"
        )


def report(scores: Scores, step: int, log: RunLog | None) -> None:
    """Scores into the log and on the terminal, on rank 0."""
    if log is not None:
        log.record({"step": step, **scores})
        shown = [f"{k} {v:.2f}" for k, v in scores.items() if "/" not in k]  # not of each class
        log.say(f"step {step}: " + "  ".join(shown))


def over_ranks(losses: dict[str, Tensor], world_size: int) -> dict[str, float]:
    """Means over all ranks, which must all call."""
    values = torch.stack(list(losses.values()))
    if world_size > 1:
        dist.all_reduce(values)
    return dict(zip(losses, (values / world_size).tolist(), strict=True))


def save(run: Training) -> None:
    """Write a checkpoint, on rank 0. Raises RunError where it cannot, or must not."""
    if run.place.rank == 0:
        content = run.content()
        if name := next(iter(checkpoints.not_finite(content["model"])), ""):
            raise RunError(
                f"weights are not finite after step {run.step}, in {name}: lower --lr, or give"
                " --precision fp32"
            )
        checkpoints.write(Path(run.config.output_dir), content, keep_last=1)
