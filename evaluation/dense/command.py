"""The command of a dense task: a run in a folder, from its start to its exit status."""

import dataclasses
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from ibeton.command import amount, refusal
from ibeton.distributed import join_processes, leave_group
from ibeton.evaluation.command import write_json
from ibeton.evaluation.dense.config import Settings
from ibeton.evaluation.dense.task import Place, Task
from ibeton.evaluation.dense.trainer import Training, report, train
from ibeton.training import checkpoints
from ibeton.training.health.stop_signals import (
    INTERRUPTED,
    STOPPED,
    StopSignals,
    block_signals_in_workers,
)
from ibeton.training.health.watchdog import Watchdog
from ibeton.training.log.run_log import RunLog
from ibeton.training.problems import check_output_dir
from ibeton.training.run_folder import RunFolder, new_identity

LOST_AFTER_S = 600  # a rank may not send heartbeats while it reads COCO's JSON or scores


def run_task(config: Settings, prepare: Callable[[Settings], Task]) -> int:
    """Train and evaluate. 0 when done, 85 when asked to stop and saved, 1 when it failed on the
    way, 2 for bad input, 130 for a second Ctrl-C. Leaves checkpoint.pt, log.jsonl, scores.json and
    pictures/ in --output-dir."""
    log, folder, watchdog, state, status, begun = None, None, None, "failed", 1, False
    with StopSignals() as stops:
        stops.limit(config.max_hours)
        try:
            place = Place(*join_processes(config.device))
            watchdog = Watchdog(place.rank, place.world_size, LOST_AFTER_S, math.inf)
            with watchdog.report_errors():
                run = begin(config, prepare, place)
                if place.rank == 0:
                    folder, log = open_folder(run)
                begun = True
                state, status = complete(run, log, stops)
        except Exception as error:
            message = refusal(error)
            if not message:
                raise
            print(f"error: {message}", file=sys.stderr)
            status = 1 if begun else 2
            if log is not None:
                state = f"failed: {message.splitlines()[0]}"
                print(checkpoints.resume_advice(Path(config.output_dir)), file=sys.stderr)
        except KeyboardInterrupt:
            state, status = "interrupted", INTERRUPTED
        finally:
            with suppress(OSError):  # a full disk, which has been reported
                if log is not None:
                    log.close()
                if folder is not None:
                    folder.close(state)
            if watchdog is not None:
                watchdog.close()
            leave_group(together=status in (0, STOPPED))
    return status


def begin(config: Settings, prepare: Callable[[Settings], Task], place: Place) -> Training:
    """The run, new or resumed. Writes nothing. Raises ValueError or OSError for bad input."""
    if place.rank == 0:
        check_output_dir(Path(config.output_dir))
    if config.workers:
        block_signals_in_workers()
    torch.manual_seed(config.seed)  # the same heads on every rank
    if config.pictures:
        import matplotlib  # noqa: F401 - not after hours
    run = Training(prepare(config), config, place)
    run.resume()
    return run


def open_folder(run: Training) -> tuple[RunFolder, RunLog]:
    """The folder, held from now on, and its log, begun. Raises as `RunFolder`."""
    out, per_epoch = Path(run.config.output_dir), len(run.task.photos) // run.config.batch_size
    begins = {"step": run.step, "processes": run.place.world_size}
    begins["steps_per_epoch"] = max(1, per_epoch)
    settings = dataclasses.asdict(run.config)
    folder = RunFolder(out, run.seen or new_identity(), run.seen, settings, begins)
    log = RunLog(out, run.step, run.task.steps, max(1, per_epoch))
    for line in filter(None, (describe(run), run.note)):
        log.say(line)
    return folder, log


def complete(run: Training, log: RunLog | None, stops: StopSignals) -> tuple[str, int]:
    """All that is left of the run. The state for run.json and the exit status."""
    if not train(run, log, stops):
        if log is not None:
            log.say(f"stopped at step {run.step}, saved: --resume auto continues")
        return "stopped", STOPPED
    scores = run.evaluate()
    report(scores, run.step, log)
    if run.place.rank == 0:
        arch = run.task.backbone_config["arch"]
        content = {"settings": dataclasses.asdict(run.config), "arch": arch, "scores": scores}
        folder = Path(run.config.output_dir)
        write_json(content, folder / "scores.json")
        run.draw()
        if log is not None:
            log.say(f"checkpoint {folder / checkpoints.NEWEST}, scores {folder / 'scores.json'}")
    return "finished", 0


def describe(run: Training) -> str:
    """The run in a few words, with the settings that it resolved."""
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    config = run.config
    return (
        f"{len(run.task.photos):,} photos, {run.task.steps:,} steps of {config.batch_size} images,"
        f" {amount(run.place.world_size, 'process', 'processes')} on {run.place.device},"
        f" {run.dtype or 'fp32'}; {trained:,} parameters train, lr {config.lr:g}, layer decay"
        f" {config.layer_decay:g}"
    )
