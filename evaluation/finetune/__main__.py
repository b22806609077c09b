"""Fine-tune a backbone with labels, score it, and keep the classifier.

ibeton finetune --checkpoint runs/vit_s/checkpoint.pt --train imagenet.beton --val val.beton
ibeton finetune --checkpoint CKPT --train train/ --val val/ --recipe semi --labels 10percent.txt
ibeton finetune --checkpoint CKPT --dataset cifar10 --root data/
torchrun --nproc_per_node 8 -m evaluation.finetune ...        the same on eight GPUs
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ibeton.command import amount, refusal
from ibeton.distributed import join_processes, leave_group, union_of_ranks
from ibeton.evaluation.command import write_json
from ibeton.evaluation.finetune.config import FinetuneConfig, from_values, parse
from ibeton.evaluation.finetune.run import BEST, FinetuneRun, Processes, lock_run_folder
from ibeton.evaluation.finetune.train import Diverged, build_monitor, report, train
from ibeton.model.checkpoint import load_checkpoint
from ibeton.progress import announce
from ibeton.training.checkpoints import NEWEST, resume_advice
from ibeton.training.health.stop_signals import INTERRUPTED, STOPPED, StopRequested, StopSignals
from ibeton.training.health.watchdog import Watchdog
from ibeton.training.log.run_log import RunLog
from ibeton.training.problems import check_output_dir, explain
from ibeton.training.run_folder import RunFolder

FAILED = 1  # exit status of a run that failed on the way
DIVERGED = -1  # of a run that diverged: a sweep goes on, else it is FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the run is done, 85 when it was asked to stop and has saved, 1 when it failed on the
    way, 2 when it could not begin, 130 at a second Ctrl-C."""
    here, status = None, 2
    with StopSignals() as stops:
        try:
            values = parse(None if argv is None else list(argv))
            announce(f"reading {values.get('checkpoint', 'the checkpoint')}")
            with stops.interruptible():
                if not values.get("checkpoint"):
                    raise ValueError("--checkpoint is missing: give the backbone to start from")
                content = load_checkpoint(values["checkpoint"])
                config = from_values(values, content["config"]["arch"])
                stops.limit(config.max_hours)
                device, rank, world_size = join_processes(config.device)
                watchdog = Watchdog(rank, world_size, config.lost_after, config.stall_after)
                here = Processes(device, rank, world_size, watchdog)
            if config.sweep:
                status = _sweep(config, content, here, stops)
            else:
                status, _ = _run(config, content, here, stops)
                status = FAILED if status == DIVERGED else status
        except Exception as error:
            message = refusal(error)
            if not message:
                raise
            print(f"error: {message}", file=sys.stderr)
        except StopRequested:
            print("stopped before the first step: nothing to save", file=sys.stderr)
            status = STOPPED
        finally:
            if here is not None:
                here.watchdog.close()
            leave_group(together=status in (0, STOPPED))
    return status


def _run(
    config: FinetuneConfig, content: dict[str, Any], here: Processes, stops: StopSignals
) -> tuple[int, dict[str, Any]]:
    """Prepare and train: the exit status and the report, empty where nothing was scored."""
    if here.rank == 0:
        check_output_dir(Path(config.output_dir))
    with here.watchdog.report_errors(), stops.interruptible():
        run = FinetuneRun(config, content, here)
    with here.watchdog.report_errors():
        folder = lock_run_folder(run) if here.rank == 0 else None
    status = _train(run, folder, stops)
    return status, report(run) if run.scores else {}


def _train(run: FinetuneRun, folder: RunFolder | None, stops: StopSignals) -> int:
    """Train, and leave everything in order. The exit status, as in `main`."""
    log, state, status = None, "failed", FAILED
    monitor = build_monitor(run)
    try:
        with _reported(run.here.watchdog):
            log = _start_log(run) if folder is not None else None
            if train(run, log, monitor, stops):
                state, status = "finished", 0
                unreadable = union_of_ranks(run.loader.unreadable)
                if log is not None:
                    _finish(run, log, unreadable)
            else:
                state, status = "stopped", STOPPED
                if log is not None:
                    why = stops.reason or "another process was asked to"
                    log.say(f"stopped ({why}) at step {run.step}; resume with --resume auto")
    except Exception as error:
        message = explain(error)
        if not message:
            raise
        state = f"failed: {message.splitlines()[0]}"
        status = DIVERGED if isinstance(error, Diverged) else FAILED
        print(f"error: {message}", file=sys.stderr)
        if run.here.rank == 0:
            print(resume_advice(run.folder), file=sys.stderr)
    except KeyboardInterrupt:
        state, status = "interrupted", INTERRUPTED
        print("interrupted at once; resume from the last save with --resume auto", file=sys.stderr)
    finally:
        monitor.close()
        with suppress(OSError):
            if log is not None:
                log.close()
            if folder is not None:
                folder.close(state)
    return status


@contextmanager
def _reported(watchdog: Watchdog) -> Iterator[None]:
    """As `report_errors`, but no other rank has to end where all have diverged: a sweep goes on."""
    diverged: Diverged | None = None
    with watchdog.report_errors():
        try:
            yield
        except Diverged as error:
            diverged = error
    if diverged is not None:
        raise diverged


def _start_log(run: FinetuneRun) -> RunLog:
    log = RunLog(run.folder, run.step, run.steps, run.loader.steps_per_epoch)
    log.say(run.config.summary(run.backbone_config["arch"]))
    processes = amount(run.here.world_size, "process", "processes")
    start = "fresh weights" if run.config.from_scratch else run.config.checkpoint
    log.say(
        f"{run.backbone_config['arch']} from {start}: {len(run.sets.train):,} photos to train on,"
        f" {len(run.sets.val):,} to evaluate on, {len(run.sets.classes)} classes,"
        f" {run.loader.steps_per_epoch} steps per epoch, {processes} on"
        f" {run.here.device}, {run.precision}, {run.loader.threads} threads each"
    )
    for note in (*run.sets.train.notes, *run.sets.val.notes, *run.notes):
        log.say(note)
    return log


def _finish(run: FinetuneRun, log: RunLog, unreadable: dict[int, str]) -> None:
    """Report the result and write finetune.json."""
    log.say_progress()
    for _, reason in sorted(unreadable.items()):
        log.say(f"unreadable: {reason}")
    if not run.scores:
        log.say(f"stopped by --stop-after at step {run.step}, before the first score")
        return
    write_json(report(run), run.folder / "finetune.json")
    last, best = run.scores[-1], run.best()
    log.say(
        f"top-1 {last['top1']:.2f} % after {last['epoch']} epochs, best {best['top1']:.2f} % after"
        f" {best['epoch']}; checkpoints {run.folder / NEWEST} and {BEST}, scores"
        f" {run.folder / 'finetune.json'}"
    )


def _sweep(
    config: FinetuneConfig, content: dict[str, Any], here: Processes, stops: StopSignals
) -> int:
    """A run for each learning rate, in folders of their own; the best by its last epoch, chosen on
    the validation set as published, is reported. A rate that diverges is noted; 1 where all do."""
    folder = Path(config.output_dir)
    reports: dict[float, dict[str, Any]] = {}
    for rate in config.sweep:
        own = dataclasses.replace(
            config, lr=rate, sweep=(), output_dir=str(folder / f"lr-{rate:g}")
        )
        status, found = _run(own, content, here, stops)
        if status == DIVERGED:
            continue
        if status or not found:
            return status
        reports[rate] = found
    if here.rank:
        return 0 if reports else FAILED
    top1 = {rate: _top1(found) for rate, found in reports.items()}
    best = max(top1, key=top1.__getitem__, default=None)
    if best is not None:
        tried = {f"{rate:g}": top1.get(rate) for rate in config.sweep}
        write_json({**reports[best], "sweep": tried}, folder / "finetune.json")
    print("| learning rate | top-1 |\n| --- | --- |")
    for rate in config.sweep:
        text = f"{top1[rate]:.2f}" if rate in top1 else "diverged"
        print(f"| {rate:g} | {text}{' (best)' if rate == best else ''} |")
    return 0 if reports else FAILED


def _top1(found: dict[str, Any]) -> float:
    """The score of the last epoch in a report."""
    ((scores,),) = (tasks.values() for tasks in found["scores"].values())
    return float(scores["top1"])


if __name__ == "__main__":
    raise SystemExit(main())
