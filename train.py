"""Pre-train an iBOT backbone: the whole run on one page.

    python train.py --arch vit_s --epochs 800 --data imagenet.beton
    torchrun --nproc_per_node 8 train.py --arch vit_s --epochs 800 --data imagenet.beton

Photos become batches (pipeline), a batch becomes a loss (model), and this file turns the handle.
"""

import dataclasses
import datetime
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from evaluation.features import PhotoSet
from evaluation.knn import evaluate_knn
from model import IBOT, build, training_step
from model.checkpoint import (
    check_same_model,
    load_checkpoint,
    model_state,
    restore_model,
    save_checkpoint,
)
from model.optim import build_optimizer
from model.schedules import cosine_schedule
from pipeline import Batch, Loader, build_loader
from training.config import Config, parse
from training.curves import plot_curves
from training.metrics import LateMetrics
from training.run_log import RunLog

CHECKPOINT = "checkpoint.pt"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}


@dataclasses.dataclass
class Run:
    """Everything that a run holds. `step` counts the steps done since the start of training."""

    config: Config
    device: torch.device
    rank: int
    world_size: int
    loader: Loader
    ibot: IBOT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    precision: str
    step: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.config.run.output_dir)

    @property
    def global_batch(self) -> int:
        return self.config.pipeline.batch_size * self.world_size


def join_processes(name: str) -> tuple[torch.device, int, int]:
    """Device, rank and number of processes; under torchrun, joins the group."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no CUDA device is usable here; use --device cpu")
    if "RANK" not in os.environ:
        return device, 0, 1
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # The others wait while rank 0 saves and evaluates.
    patience = datetime.timedelta(hours=1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    return device, dist.get_rank(), dist.get_world_size()


def prepare(config: Config) -> Run:
    """Open the data, build the model, resume. Raises ValueError or FileNotFoundError, with a
    sentence for the user."""
    device, rank, world_size = join_processes(config.run.device)
    loader = build_loader(config.pipeline, device, rank, world_size)
    precision = config.run.precision
    if precision == "auto":
        precision = "fp16" if device.type == "cuda" else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU; on a CPU use fp32 or bf16")
    if config.run.eval_every:  # a wrong path should show now, not an epoch later
        memory = PhotoSet(config.run.eval_train)
        PhotoSet(config.run.eval_val, classes=memory.classes)
    torch.manual_seed(config.pipeline.seed)  # the same weights on every rank
    ibot = build(config.model).to(device)
    optimizer = build_optimizer(ibot.student, config.run.optimizer)
    scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
    run = Run(config, device, rank, world_size, loader, ibot, optimizer, scaler, precision)
    resume(run)
    if world_size > 1:
        ibot.wrap_ddp(device)
    return run


def resume(run: Run) -> None:
    """Go on from the checkpoint that --resume names; never write over one that it does not."""
    wanted, last = run.config.run.resume, run.folder / CHECKPOINT
    if wanted == "no":
        if last.exists():
            raise ValueError(
                f"{run.folder} already holds a run: go on with --resume auto, or give another"
                " --output-dir"
            )
        return
    path = last if wanted == "auto" else Path(wanted)
    if wanted == "auto" and not path.exists():
        return
    content = load_checkpoint(path)
    check_same_model(path, content["config"], run.config.resolved())
    saved = (content["steps_per_epoch"], content["global_batch"])
    now = (run.loader.steps_per_epoch, run.global_batch)
    if saved != now:
        raise ValueError(
            f"checkpoint {path} has {saved[0]} steps an epoch of {saved[1]} images, this run"
            f" {now[0]} of {now[1]}: keep --data and (--batch-size x processes) as they were"
        )
    restore_model(run.ibot, content)
    run.optimizer.load_state_dict(content["optimizer"])
    if run.scaler is not None and content["fp16_scaler"]:
        run.scaler.load_state_dict(content["fp16_scaler"])
    run.step = content["step"]


def save(run: Run) -> None:
    """Write the checkpoint; at every --keep-every epochs one that stays, too. The RNG's state is
    (seed, step): every draw is a function of the two, see `seed_step`. Rank 0 writes."""
    if run.rank:
        return
    config, per_epoch = run.config, run.loader.steps_per_epoch
    content = {
        **model_state(run.ibot),
        "optimizer": run.optimizer.state_dict(),
        "fp16_scaler": run.scaler.state_dict() if run.scaler else None,
        "step": run.step,
        "epoch": run.step // per_epoch,  # the next one
        "rng": {"seed": config.pipeline.seed, "step": run.step},
        "steps_per_epoch": per_epoch,
        "global_batch": run.global_batch,
        "config": config.resolved(),
    }
    save_checkpoint(run.folder / CHECKPOINT, content)
    epoch, keep = run.step // per_epoch, config.run.keep_every
    if keep and run.step % per_epoch == 0 and epoch % keep == 0:
        save_checkpoint(run.folder / f"checkpoint{epoch:04d}.pt", content)


def seed_step(run: Run) -> None:
    """Stochastic depth draws from (seed, step, rank) alone, so that a resumed run draws what an
    unbroken one would have drawn."""
    entropy = np.random.SeedSequence([run.config.pipeline.seed, run.step, run.rank])
    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds that the training stood still for it."""
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - asked


def is_due(run: Run, last: int) -> bool:
    """Whether the run, as far as it has come, is to be evaluated."""
    every, per_epoch = run.config.run.eval_every, run.loader.steps_per_epoch
    if not every or run.step % per_epoch:
        return False
    return run.step == last or (run.step // per_epoch) % every == 0


def evaluate(run: Run, log: RunLog | None) -> None:
    """k-NN of the teacher, on rank 0, unless a run that was killed had come that far."""
    if log is not None and run.step not in log.scores():
        options, epoch = run.config.run, run.step // run.loader.steps_per_epoch
        top1, top5 = evaluate_knn(
            run.ibot.teacher.backbone,
            options.eval_train,
            options.eval_val,
            image_size=run.config.model.image_size,
            ks=[options.eval_k],
            device=run.device,
        )[options.eval_k]
        scores = {"knn_top1": top1, "knn_top5": top5, "knn_k": options.eval_k}
        log.record({"step": run.step, "epoch": epoch} | scores)
        log.say(f"epoch {epoch}: k-NN top-1 {top1:.2f} %  top-5 {top5:.2f} %  (k {options.eval_k})")
        plot_curves(run.folder)
    if run.world_size > 1:
        dist.barrier()


def rates(run: Run) -> list[dict[str, float]]:
    """Learning rate, weight decay and teacher momentum of every step of the whole run."""
    options, per_epoch = run.config.run, run.loader.steps_per_epoch
    peak = options.lr * run.global_batch / 256
    lr = cosine_schedule(peak, options.min_lr, options.epochs, per_epoch, options.warmup_epochs)
    decay = cosine_schedule(
        options.weight_decay, options.weight_decay_end, options.epochs, per_epoch
    )
    momentum = cosine_schedule(options.momentum_teacher, 1.0, options.epochs, per_epoch)
    names = ("lr", "weight_decay", "momentum")
    return [
        dict(zip(names, map(float, step), strict=True))
        for step in zip(lr, decay, momentum, strict=True)
    ]


def train(run: Run, log: RunLog | None) -> None:
    """All steps up to the end, or to --stop-after; at the end of epochs save and evaluate."""
    options, per_epoch = run.config.run, run.loader.steps_per_epoch
    last = options.epochs * per_epoch
    last = min(last, options.stop_after or last)
    schedule, late = rates(run), LateMetrics(run.world_size)
    if is_due(run, last):
        evaluate(run, log)
    while run.step < last:
        epoch, first = divmod(run.step, per_epoch)
        batches = itertools.islice(run.loader.epoch(epoch, first), last - run.step)
        started = time.perf_counter()
        for batch, waited in timed(batches):
            metrics = train_step(run, batch, epoch, schedule[run.step])
            show(late.settle(), log, options.log_steps)  # of the step before: keeps pace with it
            seconds, started = time.perf_counter() - started, time.perf_counter()
            speed = {"images_per_s": run.global_batch / seconds, "data_wait": waited / seconds}
            record = {"step": run.step, "epoch": epoch, **schedule[run.step], **speed}
            late.push(record | {"unreadable": len(run.loader.unreadable)}, metrics)
            run.step += 1
            ends = run.step == last or run.step % per_epoch == 0  # saved below
            if options.save_steps and run.step % options.save_steps == 0 and not ends:
                show(late.settle(), log, options.log_steps)  # never save what a bad loss touched
                save(run)
                started = time.perf_counter()
        show(late.settle(), log, options.log_steps, always=run.step == last)
        save(run)
        if is_due(run, last):
            evaluate(run, log)


def train_step(
    run: Run, batch: Batch, epoch: int, rates: dict[str, float]
) -> dict[str, torch.Tensor]:
    seed_step(run)
    return training_step(
        run.ibot,
        run.optimizer,
        run.scaler,
        batch.global_crops,
        batch.local_crops,
        batch.masks,
        epoch=epoch,
        **rates,
        clip_grad=run.config.run.clip_grad,
        freeze_last_layer=run.config.run.freeze_last_layer,
        autocast_dtype=DTYPES[run.precision],
    )


def show(
    record: dict[str, Any] | None, log: RunLog | None, every: int, always: bool = False
) -> None:
    """Bring a settled step to screen and, each so many steps, to the log."""
    if record is not None and log is not None:
        log.progress(record["step"] + 1, record)
        if always or record["step"] % every == 0:
            log.record(record)


def main(arguments: list[str] | None = None) -> int:
    """0 when the run is done, 1 when it failed on the way, 2 when it could not begin."""
    try:
        config = parse(arguments)
        run = prepare(config)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    log = None
    if run.rank == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
        resolved = json.dumps(config.resolved(), indent=2)
        (run.folder / "config.json").write_text(resolved + "\n")
        per_epoch = run.loader.steps_per_epoch
        log = RunLog(run.folder, run.step, config.run.epochs * per_epoch, per_epoch)
        log.say(resolved)
        log.say(
            f"{len(run.loader.photos):,} photos, {per_epoch} steps an epoch, {run.world_size}"
            f" process(es) on {run.device}, {run.precision}; loader {run.loader.reason}"
        )
        if run.step:
            log.say(f"resumed at step {run.step} (epoch {run.step // per_epoch})")
    try:
        train(run, log)
        if log is not None:
            report(run, log)
    except FloatingPointError as error:
        print(
            f"error: {error}; the last checkpoint in {run.folder} is sound. Go on from it with"
            " --resume auto and --precision fp32, or a smaller --lr or --clip-grad",
            file=sys.stderr,
        )
        return 1
    finally:
        run.loader.close()
        if log is not None:
            log.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def report(run: Run, log: RunLog) -> None:
    """What the run came to, in a few lines."""
    picture = plot_curves(run.folder)
    log.say(f"checkpoint {run.folder / CHECKPOINT}, log {run.folder / 'log.jsonl'}, plot {picture}")
    scores = log.scores()
    if 0 in scores and len(scores) > 1:
        now = scores[max(scores)]
        log.say(
            f"k-NN top-1: untrained {scores[0]:.2f} %, now {now:.2f} %:"
            f" {now - scores[0]:+.2f} points"
        )
    for reason in run.loader.unreadable.values():
        log.say(f"unreadable: {reason}")


if __name__ == "__main__":
    sys.exit(main())
