"""Several steps in a row came to nothing: find out why, and go back to the last checkpoint."""

import json

import torch

from ibeton.atomic import write_text
from ibeton.model.checkpoint import load_checkpoint
from ibeton.training.health.diagnosis import diagnose, sentences
from ibeton.training.health.nonfinite_guard import RunError
from ibeton.training.run import Run, newest, restore, seed_step
from ibeton.training.run_log import RunLog


def roll_back(run: Run, log: RunLog | None, dtype: torch.dtype | None) -> None:
    """Write what is the matter to trouble-rankR.json, and bring the run to its last checkpoint.

    `dtype` is that of autocast. All ranks take part. Raises RunError, with the report of this rank,
    where the same trouble has come again, or where there is nothing to go back to.
    """
    step = run.guard.last_bad
    report = _report(run, step, dtype)
    path = None if run.guard.again() else newest(run)
    if path is None:
        why = "came again after the run went back" if newest(run) else "came before a checkpoint"
        raise RunError(
            f"the trouble of step {step} {why}:\n  "
            + "\n  ".join(report)
            + f"\nsee {_report_path(run)}; go on, if it is not the data, with --precision fp32, or"
            " a smaller --lr or --clip-grad"
        )
    restore(run, path, load_checkpoint(path))
    if log is not None:
        log.roll_back(run.step)
        log.record({"step": run.step, "went_back_from": step})
        for line in (*report, f"going back from step {step} to step {run.step}, once"):
            log.say(line)


def _report(run: Run, step: int, dtype: torch.dtype | None) -> list[str]:
    """The step again on the same batch, in words; also as a file."""
    epoch, place = divmod(step, run.loader.steps_per_epoch)
    seed_step(run, step)
    scale = run.scaler.get_scale() if run.scaler is not None else 1.0
    batch = next(run.loader.epoch(epoch, place))
    report = diagnose(run.ibot, batch, epoch, dtype, scale)
    names = {index: run.loader.photos.name(index) for index in batch.indices.tolist()}
    named = {"step": step, "rank": run.rank, **report}
    named["names"] = {index: names[index] for index in {*report["images"], *report["alone"]}}
    path = _report_path(run)
    write_text(path, json.dumps(named, indent=2))
    return sentences(report, names)


def _report_path(run: Run) -> str:
    return str(run.folder / f"trouble-rank{run.rank}.json")
