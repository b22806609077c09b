"""Training of a dense task: the loop, its checkpoints and how a run resumes."""

import dataclasses
import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ibeton.command import refusal
from ibeton.distributed import join_processes
from ibeton.evaluation.command import write_json
from ibeton.evaluation.dense.config import DenseConfig
from ibeton.evaluation.dense.sync_norm import synchronize
from ibeton.evaluation.dense.task import (
    BadSample,
    Collate,
    Place,
    Samples,
    Scores,
    Task,
    keys,
    parameter_groups,
)
from ibeton.evaluation.trainable import precision_on, seed_all
from ibeton.training import checkpoints
from ibeton.training.health.nonfinite_guard import RunError
from ibeton.training.health.stop_signals import (
    INTERRUPTED,
    STOPPED,
    StopSignals,
    block_signals_in_workers,
)
from ibeton.training.log.run_log import RunLog
from ibeton.training.problems import check_output_dir
from ibeton.training.run_folder import RunFolder, changed, check_unused, identity, new_identity
from ibeton.workers import end_with_parent

Settings = TypeVar("Settings", bound=DenseConfig)
# Settings that may change when a run resumes: they do not change what is computed.
_FREE = {
    *("output_dir", "resume", "device", "workers", "save_steps", "log_steps", "eval_every"),
    *("pictures", "max_hours", "data", "checkpoint"),
}


class Training:
    """A run of a task: model, optimizer, step, and what a checkpoint keeps of them."""

    def __init__(self, task: Task, config: DenseConfig, place: Place) -> None:
        self.task, self.config, self.place, self.step = task, config, place, 0
        precision, self.dtype = precision_on(place.device, config.precision)
        if config.batch_size % place.world_size:
            raise ValueError(
                f"--batch-size {config.batch_size} does not divide by {place.world_size} processes"
            )
        self.model = task.model.to(place.device)
        groups = parameter_groups(self.model, config.weight_decay, config.layer_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=precision == "fp16")
        self.call: nn.Module = self.model
        if place.world_size > 1:
            synchronize(self.model, place.device)
            ids = [place.device] if place.device.type == "cuda" else None
            self.call = nn.parallel.DistributedDataParallel(
                self.model, device_ids=ids, broadcast_buffers=False
            )

    def rate(self, step: int) -> float:
        """Learning rate of the head at `step`."""
        warmup = min(1.0, (step + 1) / max(1, self.config.warmup_steps))
        return self.config.lr * warmup * self.task.factor(step)

    def train_step(self, batch: Any) -> dict[str, Tensor]:
        """One step on this rank's batch; its named losses, on the device."""
        seed_all(self.config.seed, self.step, self.place.rank)  # dropout, stochastic depth
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step) * group["lr_scale"]
        device = self.place.device
        self.model.train()
        with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
            losses = self.call(moved(batch, device))
        self.scaler.scale(losses["loss"]).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        return {name: loss.detach() for name, loss in losses.items()}

    def evaluate(self) -> Scores:
        self.model.eval()
        enabled = self.dtype is not None
        with torch.inference_mode(), torch.autocast(self.place.device.type, self.dtype, enabled):
            return self.task.evaluate(self.place)

    def draw(self) -> None:
        """Pictures into --output-dir, on rank 0."""
        folder, enabled = Path(self.config.output_dir) / "pictures", self.dtype is not None
        folder.mkdir(exist_ok=True)
        with torch.inference_mode(), torch.autocast(self.place.device.type, self.dtype, enabled):
            self.task.draw(self.place, folder)

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
            collate_fn=Collate(self.task.collate),
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

    def resume(self) -> str:
        """Continue from the newest checkpoint of --output-dir where --resume auto asks for it; a
        sentence for the log. Raises ValueError where that run had other settings or photos."""
        folder = Path(self.config.output_dir)
        if self.config.resume == "no":
            if self.place.rank == 0:
                check_unused(folder)
            return ""
        found = checkpoints.newest(folder)
        if found is None:
            return ""
        path, content, damaged = found
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
        self.scaler.load_state_dict(content["scaler"])
        self.step = content["step"]
        return "; ".join([*damaged, f"resumed at step {self.step} from {path}"])


def moved(batch: Any, device: torch.device) -> Any:
    """A batch of tensors, lists, tuples and dicts on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: moved(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def train(run: Training, log: RunLog | None, stops: StopSignals) -> bool:
    """All steps, with checkpoints and evaluations on the way; False where asked to stop before."""
    config, last, started, first = run.config, run.task.steps, time.monotonic(), run.step
    for batch in run.loader():
        if isinstance(batch, BadSample):
            raise ValueError(str(batch))
        losses = run.train_step(batch)
        if run.step % config.log_steps == 0 or run.step == last:
            record = over_ranks(losses, run.place.world_size)
            if not np.isfinite(record["loss"]) and not run.scaler.is_enabled():
                raise RunError(f"the loss is {record['loss']} at step {run.step}: lower --lr")
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
        try:
            checkpoints.write(Path(run.config.output_dir), content, keep_last=1)
        except OSError as error:
            raise RunError(
                f"no checkpoint could be written at step {run.step} ({error})"
            ) from error


def report(scores: Scores, step: int, log: RunLog | None) -> None:
    if log is not None:
        log.record({"step": step, **scores})
        shown = [f"{k} {v:.2f}" for k, v in scores.items() if "/" not in k]  # not of each class
        log.say(f"step {step}: " + "  ".join(shown))


def run_task(config: Settings, prepare: Callable[[Settings], Task]) -> int:
    """Train and evaluate. 0 when done, 85 when asked to stop and saved, 1 when it failed on the
    way, 2 for bad input, 130 for a second Ctrl-C. Leaves checkpoint.pt, log.jsonl, scores.json and
    pictures/ in --output-dir."""
    log, folder, state, status, begun = None, None, "failed", 1, False
    out = Path(config.output_dir)
    with StopSignals() as stops:
        stops.limit(config.max_hours)
        try:
            place = Place(*join_processes(config.device))
            if place.rank == 0:
                check_output_dir(out)
            if config.workers:
                block_signals_in_workers()
            torch.manual_seed(config.seed)  # the same heads on every rank
            if config.pictures:
                import matplotlib  # noqa: F401 - not after hours
            run = Training(prepare(config), config, place)
            seen = identity(out)
            note = run.resume()
            if place.rank == 0:
                per_epoch = max(1, len(run.task.photos) // config.batch_size)
                begins = {"step": run.step, "processes": place.world_size}
                begins["steps_per_epoch"] = per_epoch
                settings = dataclasses.asdict(config)
                folder = RunFolder(out, seen or new_identity(), seen, settings, begins)
                log = RunLog(out, run.step, run.task.steps, per_epoch)
                log.say(describe(run) + (f"\n{note}" if note else ""))
            begun = True
            if not train(run, log, stops):
                state, status = "stopped", STOPPED
                if log is not None:
                    log.say(f"stopped at step {run.step}, saved: --resume auto continues")
                return status
            scores = run.evaluate()
            report(scores, run.step, log)
            if place.rank == 0:
                settings = dataclasses.asdict(config)
                write_json({"settings": settings, "scores": scores}, out / "scores.json")
                run.draw()
            state, status = "finished", 0
        except Exception as error:
            message = refusal(error)
            if not message:
                raise
            print(f"error: {message}", file=sys.stderr)
            status = 1 if begun else 2
            if log is not None:
                state = f"failed: {message.splitlines()[0]}"
                print(checkpoints.resume_advice(out), file=sys.stderr)
        except KeyboardInterrupt:
            state, status = "interrupted", INTERRUPTED
        finally:
            if log is not None:
                log.close()
            if folder is not None:
                folder.close(state)
            if dist.is_initialized():
                dist.destroy_process_group()
    return status


def describe(run: Training) -> str:
    """The run in a few words, with the settings that it resolved."""
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    config = run.config
    return (
        f"{len(run.task.photos):,} photos, {run.task.steps:,} steps of {config.batch_size} images,"
        f" {run.place.world_size} process(es) on {run.place.device}, {run.dtype or 'fp32'};"
        f" {trained / 1e6:.1f} M parameters train, lr {config.lr:g}, layer decay"
        f" {config.layer_decay:g}"
    )
