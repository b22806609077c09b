"""Pre-train an iBOT backbone: the whole run on one page.

    python train.py --arch vit_s --epochs 800 --data imagenet.beton
    torchrun --nproc_per_node 8 train.py --arch vit_s --epochs 800 --data imagenet.beton

Photos become batches (pipeline), a batch becomes a loss (model), and this file turns the handle.
"""

import itertools
import sys
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from ibeton.command import protect_output
from ibeton.distributed import join_processes
from ibeton.evaluation.frozen.features import PhotoSet
from ibeton.evaluation.frozen.quick import quick_scores
from ibeton.model import build, training_step
from ibeton.model.cuda_graph import GraphedStep, obstacle
from ibeton.model.optim import build_optimizer
from ibeton.pipeline import Batch, build_loader
from ibeton.training.checkpoints import NEWEST
from ibeton.training.config import Config, parse
from ibeton.training.curves import plot_curves
from ibeton.training.health.collapse import PROBED, spread
from ibeton.training.health.nonfinite_guard import RunError
from ibeton.training.health.stop_signals import (
    INTERRUPTED,
    STOPPED,
    StopRequested,
    StopSignals,
    block_signals_in_workers,
)
from ibeton.training.health.watchdog import Watchdog
from ibeton.training.metrics import DelayedMetrics
from ibeton.training.rollback import roll_back
from ibeton.training.run import Run, lock_run_folder, rates, resume, save, seed_step
from ibeton.training.run_folder import RunFolder
from ibeton.training.run_log import RunLog
from ibeton.training.timing.bottleneck import LoaderResources
from ibeton.training.timing.forecast import FirstSteps, preflight
from ibeton.training.timing.monitor import StepMonitor
from ibeton.training.timing.speed import cores_a_process
from ibeton.training.trackers import Trackers
from ibeton.workers import cores

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}


def prepare(config: Config) -> Run:
    """Open the data, build the model, resume. Raises ValueError or FileNotFoundError, with a
    sentence for the user."""
    device, rank, world_size = join_processes(config.run.device)
    watchdog = Watchdog(rank, world_size, config.run.lost_after, config.run.stall_after)
    with watchdog.report_errors():
        return _prepare(config, device, rank, world_size, watchdog)


def _prepare(
    config: Config, device: torch.device, rank: int, world_size: int, watchdog: Watchdog
) -> Run:
    config.share_batch(world_size)
    loader = build_loader(config.pipeline, device, rank, world_size)
    if loader.kind.worker_processes:
        block_signals_in_workers()
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
    sharded = config.run.shard_optimizer and world_size > 1
    beta2 = config.run.adam_beta2
    optimizer = build_optimizer(ibot.student, config.run.optimizer, sharded, beta2)
    scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
    run = Run(
        config, device, rank, world_size, loader, ibot, optimizer, scaler, precision, watchdog
    )
    run.notes += config.notes
    resume(run)
    use_graphs(run)
    if world_size > 1 and run.graphed_step is None:
        ibot.wrap_ddp(device)
    return run


def use_graphs(run: Run) -> None:
    """Replay steps as CUDA graphs if --cuda-graphs and the run allow it. Raises ValueError if it is
    on and they cannot be."""
    wanted, options = run.config.model.cuda_graphs, run.config.run
    why = obstacle(run.config.model, run.optimizer, run.device)
    if wanted == "on" and why:
        raise ValueError(f"--cuda-graphs on: {why}; use auto or off")
    if wanted == "off" or why:
        if run.device.type == "cuda" and why:
            run.notes.append(f"steps run eagerly, not as CUDA graphs: {why}")
        return
    run.graphed_step = GraphedStep(
        run.ibot,
        run.optimizer,
        run.scaler,
        clip_grad=options.clip_grad,
        freeze_last_layer=options.freeze_last_layer,
        autocast_dtype=DTYPES[run.precision],
        required=wanted == "on",
    )


def is_due(run: Run, last: int) -> bool:
    """Whether the run, as far as it has come, is to be evaluated."""
    every, per_epoch = run.config.run.eval_every, run.loader.steps_per_epoch
    if not every or run.step % per_epoch:
        return False
    return run.step == last or (run.step // per_epoch) % every == 0


def evaluate(run: Run, log: RunLog | None, stops: StopSignals) -> None:
    """Quick scores of the teacher, on rank 0, unless a run that was killed had come that far. A
    request to stop leaves them undone: the run has been saved, and evaluates when it goes on."""
    if log is not None and run.step not in log.scores() and not stops.requested():
        options, epoch = run.config.run, run.step // run.loader.steps_per_epoch
        photos, size = (options.eval_train, options.eval_val), run.config.model.image_size
        with suppress(StopRequested), stops.interruptible(), run.watchdog.no_timeout("evaluation"):
            scores = quick_scores(run.ibot.teacher, *photos, size, options.eval_k, run.device)
            top1, top5, nmi = scores["knn_top1"], scores["knn_top5"], scores["head_nmi"]
            log.record({"step": run.step, "epoch": epoch, **scores, "knn_k": options.eval_k})
            log.say(
                f"epoch {epoch}: k-NN top-1 {top1:.2f} %  top-5 {top5:.2f} %  (k {options.eval_k})"
                f"  head NMI {nmi:.2f} %, {scores['head_clusters']} clusters"
            )
            plot_curves(run.folder)
    with run.watchdog.no_timeout("evaluation"):
        stops.requested_on_any_rank(run.device)  # the others wait for rank 0 here


def watch(run: Run) -> StepMonitor:
    """The clock and the figures of this rank; with --profile, a trace of rank 0."""
    batch_size, at_hand = run.config.pipeline.batch_size, cores_a_process(cores())
    workers = run.config.pipeline.workers or cores()
    on_gpu, per_epoch = run.device.type == "cuda", run.loader.steps_per_epoch
    room = LoaderResources(run.loader.kind, workers, at_hand, on_gpu, per_epoch)
    dtype = DTYPES[run.precision]
    watching = StepMonitor(batch_size, run.rank, run.world_size, run.device, dtype, room)
    options = run.config.run
    last = options.epochs * run.loader.steps_per_epoch
    left = min(last, options.stop_after or last) - run.step
    watching.forecast = FirstSteps(left, run.world_size, run.device)
    if run.config.run.profile and run.rank == 0:
        watching.trace(run.folder, run.config.run.profile)
    return watching


def train(run: Run, log: RunLog | None, watch: StepMonitor, stops: StopSignals) -> bool:
    """All steps up to the end, or to --stop-after; at the end of epochs save and evaluate. False
    where it was asked to stop before."""
    last = run.config.run.epochs * run.loader.steps_per_epoch
    last = min(last, run.config.run.stop_after or last)
    schedule, delayed = rates(run), DelayedMetrics(run.world_size)
    if is_due(run, last):
        evaluate(run, log, stops)
    while run.step < last and not stops.requested_on_any_rank(run.device):
        train_epoch(run, log, watch, stops, delayed, schedule[:last])
        if run.guard.should_roll_back():
            delayed.resolve()
            with run.watchdog.no_timeout("going back"):
                roll_back(run, log, DTYPES[run.precision])
            continue
        with run.watchdog.no_timeout("saving"):
            save(run)
        if is_due(run, last):
            evaluate(run, log, stops)
    return run.step >= last and not stops.requested_on_any_rank(run.device)


def train_epoch(
    run: Run,
    log: RunLog | None,
    watch: StepMonitor,
    stops: StopSignals,
    delayed: DelayedMetrics,
    schedule: list[dict[str, float]],
) -> None:
    """Steps to the end of the epoch or the schedule, or until the run is to stop or to go back."""
    options, per_epoch = run.config.run, run.loader.steps_per_epoch
    epoch, first = divmod(run.step, per_epoch)
    last, leave = min(len(schedule), (epoch + 1) * per_epoch), False
    batches = itertools.islice(run.loader.epoch(epoch, first), last - run.step)
    watch.clock.start()
    for batch in watch.waiting(run.watchdog.batches(batches, run.step)):
        with watch.counting():
            metrics = train_step(run, batch, epoch, schedule[run.step])
            if run.step % options.log_steps == 0:
                probe = batch.global_crops[0, :PROBED]
                metrics["spread"] = spread(run.ibot.teacher.backbone, probe, DTYPES[run.precision])
        leave = log_step(run, delayed.resolve(), log, watch)  # of the step before
        record: dict[str, Any] = {"step": run.step, "epoch": epoch, **schedule[run.step]}
        record |= {"unreadable": len(run.loader.unreadable), "indices": batch.indices}
        delayed.enqueue(record, metrics, watch.clock, stops.requested())
        watch.stepped()
        run.step += 1
        if leave:
            break
        if options.save_steps and run.step % options.save_steps == 0 and run.step < last:
            if log_step(run, delayed.resolve(), log, watch):  # or the log would lack what is saved
                return
            with run.watchdog.no_timeout("saving"):
                save(run)
            watch.clock.start()
    if not run.guard.should_roll_back():
        log_step(run, delayed.resolve(), log, watch, always=run.step == len(schedule))


def train_step(
    run: Run, batch: Batch, epoch: int, rates: dict[str, float]
) -> dict[str, torch.Tensor]:
    seed_step(run, run.step)
    if run.graphed_step is not None:
        return run.graphed_step(
            batch.global_crops, batch.local_crops, batch.masks, epoch=epoch, **rates
        )
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


def log_step(
    run: Run,
    record: dict[str, Any] | None,
    log: RunLog | None,
    watch: StepMonitor,
    always: bool = False,
) -> bool:
    """Bring a settled step to screen and, each so many steps, to the log. Every rank takes part.
    True where the run is to leave the epoch: to stop, or to go back."""
    if record is None:
        return False
    lines = watch.add(record.pop("parts"), record.pop("stage_work"))
    if run.graphed_step is not None and run.graphed_step.note:
        lines.append(run.graphed_step.note)
        run.graphed_step.note = ""
    record |= watch.figures()
    stop, indices = record.pop("stop"), record.pop("indices")
    if line := run.guard.update(record):
        lines.append(line)
        record["indices"] = indices.tolist()
    if "spread" in record:
        lines += run.alarm.add(record)
    due = always or record["step"] % run.config.run.log_steps == 0 or "skipped" in record
    if due:
        of_ranks, more = watch.compare_ranks()
        record |= of_ranks
        lines += more
    if log is not None:
        for line in lines:
            log.say(line)
        log.progress(record["step"] + 1, record)
        if due:
            log.record(record)
    return stop or run.guard.should_roll_back()


def main(arguments: list[str] | None = None) -> int:
    """0 when the run is done, 85 when it was asked to stop and has saved, 1 when it failed on the
    way, 2 when it could not begin, 130 at a second Ctrl-C."""
    protect_output()
    with StopSignals() as stops:
        try:
            config = parse(arguments)
            stops.limit(config.run.max_hours)
            with stops.interruptible():
                run = prepare(config)
            with run.watchdog.report_errors():
                folder = lock_run_folder(run) if run.rank == 0 else None
        except (ValueError, FileNotFoundError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except StopRequested:
            print("stopped before the first step: nothing to save", file=sys.stderr)
            return STOPPED
        return run_training(run, folder, stops)


def run_training(run: Run, folder: RunFolder | None, stops: StopSignals) -> int:
    """Train, and leave everything in order. The exit status, as in `main`."""
    log, watching, state, status = None, watch(run), "failed", 1
    try:
        with run.watchdog.report_errors():
            log = start_log(run) if folder is not None else None
            if train(run, log, watching, stops):
                state, status = "finished", 0
                if log is not None:
                    report(run, log)
            else:
                state, status = "stopped", STOPPED
                if log is not None:
                    why = stops.reason or "another process was asked to"
                    log.say(f"stopped ({why}) at step {run.step}, saved: --resume auto goes on")
    except (RunError, OSError) as error:
        state = f"failed: {str(error).splitlines()[0]}"
        print(f"error: {error}\nthe last checkpoint in {run.folder} is sound", file=sys.stderr)
    except KeyboardInterrupt:
        state, status = "interrupted", INTERRUPTED
        print("interrupted at once; --resume auto goes on from the last save", file=sys.stderr)
    finally:
        watching.close()
        run.loader.close()
        with suppress(OSError):  # a full disk, which has been told
            if log is not None:
                log.close()
            if folder is not None:
                folder.close(state)
        run.watchdog.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    return status


def start_log(run: Run) -> RunLog:
    """The log, with what is to be known of the run from the start."""
    per_epoch = run.loader.steps_per_epoch
    log = RunLog(run.folder, run.step, run.config.run.epochs * per_epoch, per_epoch)
    log.trackers = Trackers(run.config.run.log_to, run.name, run.folder, run.config.resolved())
    log.say(run.config.summary())
    log.say(
        f"{len(run.loader.photos):,} photos, {per_epoch} steps an epoch, {run.world_size}"
        f" process(es) on {run.device}, {run.precision}; loader {run.loader.reason}"
    )
    for note in run.notes:
        log.say(note)
    log.say(preflight(run))
    return log


def report(run: Run, log: RunLog) -> None:
    """What the run came to, in a few lines."""
    picture = plot_curves(run.folder)
    log.say(f"checkpoint {run.folder / NEWEST}, log {run.folder / 'log.jsonl'}, plot {picture}")
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
