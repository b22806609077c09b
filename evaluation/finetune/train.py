"""The loop of fine-tuning: train an epoch, score it, save; and what a run says and leaves."""

import itertools
from collections.abc import Iterator
from contextlib import closing, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ibeton.distributed import without_reduction
from ibeton.evaluation.finetune.loader import Batch
from ibeton.evaluation.finetune.run import FinetuneRun, save
from ibeton.evaluation.finetune.score import score
from ibeton.evaluation.finetune.steps import soft_cross_entropy
from ibeton.evaluation.frozen.features import Extraction
from ibeton.evaluation.trainable import seed_all
from ibeton.stages import stage
from ibeton.training.health.nonfinite_guard import RunError
from ibeton.training.health.stop_signals import StopSignals
from ibeton.training.log.metrics import DelayedMetrics
from ibeton.training.log.run_log import RunLog
from ibeton.training.timing.bottleneck import LoaderResources
from ibeton.training.timing.monitor import StepMonitor
from ibeton.training.timing.speed import cores_a_process
from ibeton.workers import cores


def build_monitor(run: FinetuneRun) -> StepMonitor:
    """The clock and the figures of this rank."""
    here, images = run.here, run.config.batch_size // run.here.world_size
    own = cores_a_process(cores())
    resources = LoaderResources(None, run.loader.threads, own, on_gpu=False)
    return StepMonitor(images, here.rank, here.world_size, here.device, run.dtype, resources)


class Diverged(RunError):
    """A run has diverged, and all ranks know: each of them raises it."""


def train(run: FinetuneRun, log: RunLog | None, monitor: StepMonitor, stops: StopSignals) -> bool:
    """All steps up to the end, or to --stop-after, with a score every --eval-every epochs and at
    the end. False where it was asked to stop before. Raises Diverged."""
    last = min(run.steps, run.config.stop_after or run.steps)
    per_epoch, delayed = run.loader.steps_per_epoch, DelayedMetrics(run.here.world_size)
    while run.step < last and not stops.requested_on_any_rank(run.here.device):
        _train_epoch(run, log, monitor, stops, delayed, last)
        if run.guard.should_roll_back():
            raise Diverged(
                f"step {run.guard.last_bad} and those before it had loss or gradients that are not"
                " finite: lower --lr, set --clip-grad, or give --precision fp32"
            )
        epoch, rest = divmod(run.step, per_epoch)
        best = False
        if not rest and (epoch % run.config.eval_every == 0 or run.step == run.steps):
            best = _score(run, log)
        with run.here.watchdog.no_timeout("saving"):
            save(run, best)
    return run.step >= last


def _train_epoch(
    run: FinetuneRun,
    log: RunLog | None,
    monitor: StepMonitor,
    stops: StopSignals,
    delayed: DelayedMetrics,
    last: int,
) -> None:
    """Steps to the end of the epoch or to `last`, or until the run is to stop."""
    config, here = run.config, run.here
    epoch, first = divmod(run.step, run.loader.steps_per_epoch)
    last = min(last, (epoch + 1) * run.loader.steps_per_epoch)
    with closing(run.loader.epoch(epoch, first)) as made:
        batches = here.watchdog.batches(itertools.islice(made, last - run.step), run.step)
        monitor.clock.start()
        for batch in monitor.waiting(batches):
            run.schedule.step_update(run.step)
            lr = max(group["lr"] for group in run.optimizer.param_groups)
            with monitor.counting():
                metrics = train_step(run, batch)
            if run.average is not None:
                with stage("ema"):
                    run.average.update(run.classifier)
            leave = _log_step(run, delayed.resolve(), log, monitor)  # of the step before
            record = {"step": run.step, "epoch": epoch, "lr": lr}
            record["unreadable"] = len(run.loader.unreadable)
            delayed.enqueue(record, metrics, monitor.clock, stops.requested())
            run.step += 1
            if leave:
                break
            if config.save_steps and run.step % config.save_steps == 0 and run.step < last:
                if _log_step(run, delayed.resolve(), log, monitor):
                    return
                with here.watchdog.no_timeout("saving"):
                    save(run)
                monitor.clock.start()
        _log_step(run, delayed.resolve(), log, monitor, always=run.step == run.steps)


def train_step(run: FinetuneRun, batch: Batch) -> dict[str, Tensor]:
    """Train on a process's share of a batch in --accumulate parts; the learning rates are those
    that the optimizer holds.

    Returns loss, acc (share of images whose heaviest target is predicted) and grad_norm, scalars
    without gradient. A step whose loss or gradients are not finite leaves weights and optimizer
    unchanged on all ranks.
    """
    config, model, device, dtype = run.config, run.model, run.here.device, run.dtype
    run.optimizer.zero_grad(set_to_none=True)
    scaler, results = run.scaler, []
    for i, (images, targets) in enumerate(_parts(run, batch)):
        seed_all(config.seed, run.step, run.here.rank, i, 1)  # stochastic depth
        with nullcontext() if i == config.accumulate - 1 else without_reduction(model):
            with (
                stage("student"),
                torch.autocast(device.type, dtype=dtype, enabled=dtype is not None),
            ):
                logits = model(images)
            with stage("loss"):
                loss = soft_cross_entropy(logits, targets)
            with stage("backward"):
                scaler.scale(loss / config.accumulate).backward()
        right = logits.detach().argmax(1) == targets.argmax(1)
        results.append(torch.stack([loss.detach(), right.float().mean()]))
    with stage("optimizer"):
        scaler.unscale_(run.optimizer)
        limit = config.clip_grad or float("inf")
        norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        if scaler.is_enabled():
            scaler.step(run.optimizer)
            scaler.update()
        elif norm.isfinite():
            run.optimizer.step()
    loss, acc = torch.stack(results).mean(dim=0)
    return {"loss": loss, "acc": acc, "grad_norm": norm.detach()}


def _parts(run: FinetuneRun, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """The parts of a batch, each mixed group by group."""
    group, count = run.group, len(batch.images)
    each, first = count // run.config.accumulate, run.here.rank * count // group
    for start in range(0, count, each):
        with stage("copy"):
            mixed = []
            for at in range(start, start + each, group):
                images, labels = batch.images[at : at + group], batch.labels[at : at + group]
                mixed.append(run.mixer(images, labels, run.step, first + at // group))
            images, targets = (torch.cat(tensors) for tensors in zip(*mixed, strict=True))
        yield images, targets


def _log_step(
    run: FinetuneRun,
    record: dict[str, Any] | None,
    log: RunLog | None,
    monitor: StepMonitor,
    always: bool = False,
) -> bool:
    """Bring a step to screen and, every --log-steps, to the log. All ranks take part. True where
    the run is to leave the epoch."""
    if record is None:
        return False
    lines = monitor.add(record.pop("parts"), record.pop("stage_work"))
    record |= monitor.figures()
    stop = record.pop("stop")
    if line := run.guard.update(record):
        lines.append(line)
    due = always or record["step"] % run.config.log_steps == 0 or "skipped" in record
    if due:
        of_ranks, more = monitor.compare_ranks()
        record |= of_ranks
        lines += more
    if log is not None:
        for line in lines:
            log.say(line)
        log.progress(record["step"] + 1, record)
        if due:
            log.record(record)
    return stop or run.guard.should_roll_back()


def _score(run: FinetuneRun, log: RunLog | None) -> bool:
    """Score the classifier, and the average of its weights; whether it is the best so far."""
    config, epoch = run.config, run.step // run.loader.steps_per_epoch
    how = Extraction(run.here.device, config.eval_batch_size, config.workers, run.precision)
    average = [] if run.average is None else [run.average.module]
    with run.here.watchdog.no_timeout("evaluation"):
        scores, *averaged = score([run.classifier, *average], run.views, how)
    for one in averaged:
        scores |= {f"ema_{name}": one[name] for name in ("top1", "top5")}
    before = run.best()
    run.scores.append({"epoch": epoch, **scores})
    if log is not None:
        log.record({"step": run.step, **run.scores[-1]})
        also = f"  EMA {scores['ema_top1']:.2f} %" if "ema_top1" in scores else ""
        log.say(
            f"epoch {epoch}/{config.epochs}: top-1 {scores['top1']:.2f} %"
            f"  top-5 {scores['top5']:.2f} %{also}"
        )
    return not before or scores["top1"] > before["top1"]


def report(run: FinetuneRun) -> dict[str, Any]:
    """What finetune.json holds: the last epoch's scores and the best one's, under the name of the
    task."""
    last, best, config = run.scores[-1], run.best(), run.config
    scores = {
        "top1": last["top1"],
        "top5": last["top5"],
        "best_top1": best["top1"],
        "best_epoch": best["epoch"],
        "epochs": config.epochs,
        "lr": config.lr,
        "photos": len(run.sets.train),
        **{name: value for name, value in last.items() if name.startswith("ema_")},
    }
    train, val = config.train, config.val
    if config.dataset:
        train, val = f"{config.dataset} in {config.root}", config.dataset
    network = "untrained" if config.from_scratch else config.network
    return {
        "checkpoint": config.checkpoint,
        "train": train,
        "val": val,
        "precision": run.precision,
        "network": network,
        "arch": run.backbone_config["arch"],
        "image_size": run.views.size,
        "left_out": {},
        "scores": {network: {task_name(run): scores}},
    }


def task_name(run: FinetuneRun) -> str:
    """The task's name in files: finetune, transfer_cifar10, semi_0.1 by the share of labels, or
    transfer_cifar10_semi_0.1."""
    config = run.config
    names = [f"transfer_{config.dataset}"] if config.dataset else []
    if config.labels:
        stem = config.labels.rsplit("/", 1)[-1].removesuffix(".txt")
        share = {"1percent": "0.01", "10percent": "0.1"}.get(stem, stem)
        with suppress(ValueError):
            share = f"{float(config.labels):g}"
        names.append(f"semi_{share}")
    return "_".join(names) or "finetune"
