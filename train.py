"""Pre-train an iBOT backbone: the whole run on one page.

    python train.py --arch vit_s --epochs 800 --data imagenet.beton
    torchrun --nproc_per_node 8 train.py --arch vit_s --epochs 800 --data imagenet.beton

The pipeline turns photos into batches, the model turns a batch into a loss, and this file runs the
loop: step, log, save, evaluate.
"""

from ibeton.progress import announce
from ibeton.workers import before_torch

if __name__ == "__main__":
    before_torch()
    announce("loading PyTorch")  # the imports below take seconds

import faulthandler
import itertools
import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ibeton.command import amount, missing_extra, protect_output, refusal
from ibeton.distributed import join_processes, leave_group, union_of_ranks
from ibeton.model import build, training_step
from ibeton.model.cuda_graph import GraphedStep, obstacle
from ibeton.model.fused.check import kernel_fault
from ibeton.model.kernels.launch import switch_off
from ibeton.model.optim import build_optimizer
from ibeton.model.steps import Step
from ibeton.pipeline import Batch, build_loader
from ibeton.training import checkpoints
from ibeton.training.config import Config, parse
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
from ibeton.training.log.metrics import DelayedMetrics
from ibeton.training.log.run_log import RunLog
from ibeton.training.log.trackers import Trackers
from ibeton.training.precision import DTYPES, precision_on
from ibeton.training.problems import check_output_dir, check_readable, explain
from ibeton.training.rollback import roll_back
from ibeton.training.run import (
    Run,
    export_backbones,
    lock_run_folder,
    rate_schedule,
    resume,
    seed_step,
    try_save,
)
from ibeton.training.run_folder import RunFolder
from ibeton.training.timing.bottleneck import LoaderResources
from ibeton.training.timing.forecast import preflight
from ibeton.training.timing.monitor import StepMonitor
from ibeton.training.timing.speed import cores_a_process
from ibeton.workers import cores


@dataclass
class Loop:
    """What the training loop works with: the run, its log (on rank 0), clock and stop signals.
    `schedule`: learning rate, weight decay and momentum of every step."""

    run: Run
    log: RunLog | None
    monitor: StepMonitor
    stops: StopSignals

    def __post_init__(self) -> None:
        self.schedule = rate_schedule(self.run)
        self.metrics = DelayedMetrics(self.run.world_size)


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
    precision = precision_on(device, config.run.precision)
    if rank == 0:
        check_output_dir(Path(config.run.output_dir))
    data = " ".join(config.pipeline.data)
    announce(f"opening {data}")
    loader = build_loader(config.pipeline, device, rank, world_size)
    check_readable(loader.photos, f"--data {data}")
    if loader.kind.worker_processes:
        block_signals_in_workers()
    if config.run.eval_every:  # a wrong path should show now, not an epoch later
        from ibeton.evaluation.photos import PhotoSet

        memory = PhotoSet(config.run.eval_train)
        PhotoSet(config.run.eval_val, classes=memory.classes)
    kernels = check_kernels(config, device, precision)
    announce(f"building {config.model.arch} on {device}")
    torch.manual_seed(config.pipeline.seed)  # the same weights on every rank
    ibot = build(config.model).to(device)
    sharded = config.run.shard_optimizer and world_size > 1
    beta2 = config.run.adam_beta2
    optimizer = build_optimizer(ibot.student, config.run.optimizer, sharded, beta2)
    scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
    run = Run(
        config, device, rank, world_size, loader, ibot, optimizer, scaler, precision, watchdog
    )
    run.notes += [*config.notes, *kernels]
    use_graphs(run)
    resume(run)
    if world_size > 1 and run.graphed_step is None:
        ibot.wrap_ddp(device)
    return run


def check_kernels(config: Config, device: torch.device, precision: str) -> list[str]:
    """Switch the step's kernels off if --kernels says so, or if they do not compute on this GPU
    what PyTorch computes. Returns notes for the log."""
    if config.model.kernels == "off":
        switch_off()
    elif device.type == "cuda":
        announce("comparing the kernels of a step with PyTorch's own operations")
        sizes = config.pipeline.global_crops_size, config.pipeline.local_crops_size
        if fault := kernel_fault(config.model, sizes, device, DTYPES[precision]):
            switch_off()
            return [
                "the step runs PyTorch's own operations instead of the Triton kernels, which is"
                f" slower: {fault}"
            ]
    return []


def use_graphs(run: Run) -> None:
    """Replay steps as CUDA graphs if --cuda-graphs and the run allow it. Raises ValueError if it is
    on and they cannot be."""
    wanted, options = run.config.model.cuda_graphs, run.config.run
    why = obstacle(run.config.model, run.optimizer, run.device)
    if wanted == "on" and why:
        raise ValueError(f"--cuda-graphs on: {why}; use auto or off")
    # With several, graphs cannot hide the exchange of gradients behind the backward.
    if wanted == "off" or why or (wanted == "auto" and run.world_size > 1):
        if run.device.type == "cuda" and why:
            run.notes.append(f"steps run eagerly, not as CUDA graphs: {why}")
        return
    settings = (options.clip_grad, options.freeze_last_layer, DTYPES[run.precision])
    step = Step(run.ibot, run.optimizer, run.scaler, *settings)
    run.graphed_step = GraphedStep(step, required=wanted == "on")


def train(loop: Loop) -> bool:
    """Train to the last step; save and evaluate at the ends of epochs. False if a request to stop
    came first. Raises RunError if training diverges, or ends in skipped steps."""
    run = loop.run
    if evaluation_due(loop):
        evaluate(loop)
    if run.step < run.last and loop.log is not None:
        loop.log.say(
            "loading the first batch; the first run on a machine spends about a minute compiling"
        )
    while run.step < run.last and not loop.stops.requested_on_any_rank(run.device):
        train_epoch(loop)
        with run.watchdog.no_timeout("saving"):
            saved = try_save(run)
        if run.guard.should_roll_back():
            with run.watchdog.no_timeout("rolling back"):
                roll_back(run, loop.log)
        elif saved and evaluation_due(loop):
            evaluate(loop)
    if run.step < run.last or loop.stops.requested_on_any_rank(run.device):
        return False
    if run.save_deferred:
        raise RunError(f"the run ended in skipped steps, from step {run.guard.first_bad} on")
    return True


def train_epoch(loop: Loop) -> None:
    """Steps until the end of the epoch or of training, or until the run must stop or roll back."""
    run, monitor = loop.run, loop.monitor
    options, per_epoch = run.config.run, run.loader.steps_per_epoch
    epoch, first = divmod(run.step, per_epoch)
    end = min(run.last, (epoch + 1) * per_epoch)
    batches = itertools.islice(run.loader.epoch(epoch, first), end - run.step)
    monitor.clock.start()
    for batch in monitor.waiting(run.watchdog.batches(batches, run.step)):
        rates = loop.schedule[run.step]
        with monitor.counting():
            metrics = train_step(run, batch, epoch, rates)
        probe = batch.global_crops[0, :PROBED]
        if run.step % options.log_steps == 0 and len(probe) > 1:
            metrics["spread"] = spread(run.ibot.teacher.backbone, probe, DTYPES[run.precision])
        stop = settle(loop)  # the step before: the device is done with it
        record: dict[str, Any] = {"step": run.step, "epoch": epoch, **rates}
        record |= {"unreadable": len(run.loader.unreadable), "indices": batch.indices}
        loop.metrics.enqueue(record, metrics, monitor.clock, loop.stops.requested())
        monitor.stepped()
        run.step += 1
        if stop or run.guard.should_roll_back():
            break
        due = options.save_steps and run.step % options.save_steps == 0
        if (due or run.save_deferred) and run.step < end:
            stop = settle(loop)  # the log must not lack a step that the checkpoint has
            with run.watchdog.no_timeout("saving"):
                try_save(run)
            if stop or run.guard.should_roll_back():
                return
            monitor.clock.start()
    if run.guard.should_roll_back():
        loop.metrics.resolve()  # a step of the streak: forgotten
    else:
        settle(loop)


def train_step(
    run: Run, batch: Batch, epoch: int, rates: dict[str, float]
) -> dict[str, torch.Tensor]:
    seed_step(run, run.step)
    crops, local, masks = batch.global_crops, batch.local_crops, batch.masks
    if run.graphed_step is not None:
        return run.graphed_step(crops, local, masks, epoch=epoch, **rates)
    return training_step(
        run.ibot,
        run.optimizer,
        run.scaler,
        crops,
        local,
        masks,
        epoch=epoch,
        **rates,
        clip_grad=run.config.run.clip_grad,
        freeze_last_layer=run.config.run.freeze_last_layer,
        autocast_dtype=DTYPES[run.precision],
    )


def settle(loop: Loop) -> bool:
    """Read the numbers of the last step, judge and log them. All ranks take part. Returns whether
    any rank was asked to stop."""
    record = loop.metrics.resolve()
    if record is None:
        return False
    run, monitor = loop.run, loop.monitor
    lines = monitor.add(record.pop("parts"), record.pop("stage_work"))
    if run.graphed_step is not None and run.graphed_step.note:
        lines.append(run.graphed_step.note)
        run.graphed_step.note = ""
    record |= monitor.figures()
    stop, indices = bool(record.pop("stop")), record.pop("indices")
    if line := run.guard.update(record):
        lines.append(line)
        record["indices"] = indices.tolist()
    step = record["step"]
    regular = step % run.config.run.log_steps == 0
    if regular:
        lines += run.alarm.add(record)
    due = regular or step + 1 == run.last or "skipped" in record
    if due:
        ranks, more = monitor.compare_ranks()
        record |= ranks
        lines += more
    if loop.log is not None:
        for line in lines:
            loop.log.say(line)
        loop.log.progress(step + 1, record)
        if due:
            loop.log.record(record)
    return stop


def evaluation_due(loop: Loop) -> bool:
    """Whether the run, at its present step, is to be evaluated."""
    run = loop.run
    every, per_epoch = run.config.run.eval_every, run.loader.steps_per_epoch
    if not every or run.step % per_epoch:
        return False
    return run.step == run.last or (run.step // per_epoch) % every == 0


def evaluate(loop: Loop) -> None:
    """Log quick scores of the teacher, on rank 0, unless the log has them. A request to stop
    abandons them: the run has been saved, and evaluates when it resumes."""
    run, log, stops = loop.run, loop.log, loop.stops
    with run.watchdog.no_timeout("evaluation"):
        if log is not None and run.step not in log.scores() and not stops.requested():
            log.say(f"k-NN at step {run.step} ...")
            with suppress(StopRequested):
                log_scores(run, log, stops)
        stops.requested_on_any_rank(run.device)  # the others wait for rank 0 here


def log_scores(run: Run, log: RunLog, stops: StopSignals) -> None:
    """Evaluate the teacher. Raises StopRequested, before anything is written, at a request to
    stop."""
    from ibeton.evaluation.frozen.quick import quick_scores
    from ibeton.training.log.curves import plot_curves

    options, epoch = run.config.run, run.step // run.loader.steps_per_epoch
    photos, size = (options.eval_train, options.eval_val), run.config.model.image_size
    with stops.interruptible():
        scores = quick_scores(run.ibot.teacher, *photos, size, options.eval_k, run.device)
    top1, top5, nmi = scores["knn_top1"], scores["knn_top5"], scores["head_nmi"]
    log.record({"step": run.step, "epoch": epoch, **scores, "knn_k": options.eval_k})
    log.say(
        f"epoch {epoch}: k-NN top-1 {top1:.2f} %  top-5 {top5:.2f} %  (k {options.eval_k})"
        f"  head NMI {nmi:.2f} %, {scores['head_clusters']} clusters"
    )
    plot_curves(run.folder)
    export_backbones(run)  # again, with the score on their cards


def main(arguments: list[str] | None = None) -> int:
    """0 when the run is done, 85 when it was asked to stop and has saved, 1 when it failed, 2 when
    it could not begin, 130 at a second Ctrl-C."""
    protect_output()
    if sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)  # SIGBUS, say, of a .beton file that was cut short
    with StopSignals() as stops:
        try:
            config = parse(arguments)
            stops.limit(config.run.max_hours)
            with stops.interruptible():
                run = prepare(config)
            with run.watchdog.report_errors():
                folder = lock_run_folder(run) if run.rank == 0 else None
        except Exception as error:
            message = refusal(error)
            if not message:
                raise
            print(f"error: {message}", file=sys.stderr)
            return 2
        except StopRequested:
            print("stopped before the first step: nothing to save", file=sys.stderr)
            return STOPPED
        return run_training(run, folder, stops)


def run_training(run: Run, folder: RunFolder | None, stops: StopSignals) -> int:
    """Train, then close everything. Returns the exit status, as in `main`."""
    log, monitor, state, status = None, build_monitor(run), "failed", 1
    try:
        with run.watchdog.report_errors():
            log = start_log(run) if folder is not None else None
            finished = train(Loop(run, log, monitor, stops))
            state, status = ("finished", 0) if finished else ("stopped", STOPPED)
            unreadable = union_of_ranks(run.loader.unreadable) if finished else {}
            if log is not None and finished:
                report(run, log, unreadable)
            elif log is not None:
                why = stops.reason or "another process was asked to"
                log.say(
                    f"stopped ({why}) at step {run.step}; {checkpoints.resume_advice(run.folder)}"
                )
    except Exception as error:
        message = explain(error)
        if not message:
            raise
        state = f"failed: {message.splitlines()[0]}"
        print(f"error: {message}", file=sys.stderr)
        if run.rank == 0:
            print(checkpoints.resume_advice(run.folder), file=sys.stderr)
    except KeyboardInterrupt:
        state, status = "interrupted", INTERRUPTED
        print("interrupted; --resume auto continues from the last save", file=sys.stderr)
    finally:
        try:
            close(run, monitor, log, folder, state, together=status in (0, STOPPED))
        except KeyboardInterrupt:
            status = INTERRUPTED
    return status


def close(
    run: Run,
    monitor: StepMonitor,
    log: RunLog | None,
    folder: RunFolder | None,
    state: str,
    together: bool,
) -> None:
    """Close everything, also if a part cannot be closed or a Ctrl-C comes meanwhile. Kills worker
    processes that are left: Python would wait for them. `together`: all ranks do the same."""
    with ExitStack() as stack:  # the last one first
        stack.callback(kill_workers)
        stack.callback(leave_group, together)
        stack.callback(run.watchdog.close)
        if folder is not None:
            stack.enter_context(suppress(OSError))  # a full disk, which has been reported
            stack.callback(folder.close, state)
        if log is not None:
            stack.enter_context(suppress(OSError))
            stack.callback(log.close)
        for part in (run.loader, monitor):
            stack.enter_context(os_errors_printed())
            stack.callback(part.close)


@contextmanager
def os_errors_printed() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        print(f"while the run was closed: {explain(error)}", file=sys.stderr)


def kill_workers() -> None:
    for worker in multiprocessing.active_children():
        worker.kill()


def build_monitor(run: Run) -> StepMonitor:
    """The clock and the figures of this rank; with --profile, a trace of rank 0."""
    options, per_epoch = run.config.run, run.loader.steps_per_epoch
    workers, own_cores = run.config.pipeline.workers or cores(), cores_a_process(cores())
    on_gpu = run.device.type == "cuda"
    resources = LoaderResources(run.loader.kind, workers, own_cores, on_gpu, per_epoch)
    monitor = StepMonitor(
        images=run.config.pipeline.batch_size,
        rank=run.rank,
        world_size=run.world_size,
        device=run.device,
        dtype=DTYPES[run.precision],
        room=resources,
        steps_left=run.last - run.step,
    )
    if options.profile and run.rank == 0:
        monitor.trace(run.folder, options.profile)
    return monitor


def start_log(run: Run) -> RunLog:
    """The log, with the settings and a forecast of the run."""
    per_epoch = run.loader.steps_per_epoch
    log = RunLog(run.folder, run.step, run.steps, per_epoch, run.last)
    log.trackers = Trackers(run.config.run.log_to, run.name, run.folder, run.config.resolved())
    processes = amount(run.world_size, "process", "processes")
    log.say(run.config.summary())
    log.say(
        f"{len(run.loader.photos):,} photos, {per_epoch} steps per epoch, {processes}"
        f" on {run.device}, {run.precision}; loader {run.loader.reason}"
    )
    for note in run.notes:
        log.say(note)
    log.say(preflight(run))
    return log


def report(run: Run, log: RunLog, unreadable: dict[int, str]) -> None:
    """Say in a few lines what the run produced."""
    from ibeton.training.log.curves import plot_curves

    log.say_progress()
    picture = plot_curves(run.folder) or f"none ({missing_extra('matplotlib')})"
    newest = run.folder / checkpoints.NEWEST
    log.say(f"checkpoint {newest}, log {run.folder / 'log.jsonl'}, plot {picture}")
    scores = log.scores()
    if 0 in scores and len(scores) > 1:
        now = scores[max(scores)]
        log.say(
            f"k-NN top-1: untrained {scores[0]:.2f} %, now {now:.2f} %:"
            f" {now - scores[0]:+.2f} points"
        )
    for _, reason in sorted(unreadable.items()):
        log.say(f"unreadable: {reason}")


if __name__ == "__main__":
    sys.exit(main())
