"""Rolls a run back to a checkpoint after repeated skipped steps, and reports the cause."""

import json

import torch
import torch.distributed as dist

from ibeton.atomic import write_text
from ibeton.model.checkpoint import load_checkpoint
from ibeton.training import checkpoints
from ibeton.training.health.diagnosis import diagnose, sentences
from ibeton.training.health.nonfinite_guard import RunError
from ibeton.training.log.run_log import RunLog
from ibeton.training.precision import DTYPES
from ibeton.training.run import Run, restore, seed_step


def roll_back(run: Run, log: RunLog | None) -> None:
    """Write the cause to trouble-rankR.json and restore the newest checkpoint that was followed by
    a good step, or an older one if that has already failed to help.

    Collective. Raises RunError, with the report of this rank, if the photos are the cause or if
    there is no checkpoint to restore; the folder's newest checkpoint is then the last good one.
    """
    step, again = run.guard.last_bad, run.guard.rolled_back_before()
    lines, photos_to_blame, weights_to_blame = _report(run, step)
    # Pixels that are not finite say nothing against the checkpoint that they were met after.
    only_photos = photos_to_blame and run.guard.diverging_since() is None
    up_to = run.guard.first_bad if only_photos else run.guard.newest_target()
    path, damaged = checkpoints.newest_of_rank_0(run.folder, run.device, up_to)
    lines += damaged
    if path is None or (again and photos_to_blame):
        if not (photos_to_blame or weights_to_blame):  # what was saved has finite weights
            lines += _set_aside(run, run.guard.last_good)
        why = (
            "recurred after a rollback" if again else "occurred before the first usable checkpoint"
        )
        advice = (
            "check these photos"
            if photos_to_blame
            else "try a smaller --lr or --clip-grad, more --warmup-epochs, or --precision fp32"
        )
        raise RunError(
            f"non-finite values in step {step}, which {why}:\n  "
            + "\n  ".join(lines)
            + f"\nsee {_report_path(run)}; {advice}"
        )
    content = load_checkpoint(path)
    proven = run.guard.last_good
    run.guard.rolled_back(content["step"])  # before the guard forgets the streak
    restore(run, path, content)
    # A checkpoint from which a good step was made stays, also if going back to it did not help:
    # it may be a fault of the steps after it, which an older one meets again.
    lines += _set_aside(run, max(run.step, proven))
    if log is not None:
        log.roll_back(run.step)
        log.record({"step": run.step, "went_back_from": step})
        for line in (*lines, f"rolling back from step {step} to step {run.step}"):
            log.say(line)


def _set_aside(run: Run, step: int) -> list[str]:
    """Set aside checkpoints saved after `step`; returns a line about it on rank 0."""
    if run.world_size > 1:
        dist.barrier()  # until all have read the checkpoint that they return to
    taken = checkpoints.set_aside(run.folder, step) if run.rank == 0 and step >= 0 else []
    if not taken:
        return []
    return [f"saved after step {step}, no longer used: {', '.join(taken)} (the newest is now"
            f" {checkpoints.DIVERGED})"]  # fmt: skip


def _report(run: Run, step: int) -> tuple[list[str], bool, bool]:
    """Diagnose the step on the same batch. Returns the findings in words, and whether any rank has
    non-finite pixels or weights; also writes them to a file."""
    epoch, place = divmod(step, run.loader.steps_per_epoch)
    seed_step(run, step)
    scale = run.scaler.get_scale() if run.scaler is not None else 1.0
    batch = next(run.loader.epoch(epoch, place))
    report = diagnose(run.ibot, batch, epoch, DTYPES[run.precision], scale)
    report["diverging_since"] = run.guard.diverging_since()
    names = {index: run.loader.photos.name(index) for index in batch.indices.tolist()}
    named = {"step": step, "rank": run.rank, **report}
    named["names"] = {index: names[index] for index in {*report["images"], *report["alone"]}}
    path = _report_path(run)
    write_text(path, json.dumps(named, indent=2))
    blame = [float(bool(report[name])) for name in ("images", "weights")]
    bad = torch.tensor(blame, device=run.device)
    if run.world_size > 1:
        dist.all_reduce(bad, dist.ReduceOp.MAX)
    photos, weights = (bad > 0).tolist()
    return sentences(report, names), photos, weights


def _report_path(run: Run) -> str:
    return str(run.folder / f"trouble-rank{run.rank}.json")
