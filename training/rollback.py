"""Rolls a run back after repeated skipped steps: finds the cause, returns to a checkpoint."""

import json

import torch
import torch.distributed as dist

from ibeton.atomic import write_text
from ibeton.model.checkpoint import load_checkpoint
from ibeton.training import checkpoints
from ibeton.training.health.diagnosis import diagnose, sentences
from ibeton.training.health.nonfinite_guard import RunError
from ibeton.training.log.run_log import RunLog
from ibeton.training.run import Run, newest, restore, seed_step


def roll_back(run: Run, log: RunLog | None, dtype: torch.dtype | None) -> None:
    """Report the cause in trouble-rankR.json, and return the run to the newest checkpoint from
    which a good step was made; if that did not help before, to an older one.

    `dtype` is that of autocast. All ranks take part. Raises RunError, with the report of this rank,
    if the photos are to blame or if there is no checkpoint to return to; the folder's newest
    checkpoint is then the last good one.
    """
    step, again = run.guard.last_bad, run.guard.rolled_back_before()
    lines, photos_to_blame, weights_to_blame = _report(run, step, dtype)
    path = newest(run, run.guard.newest_target())
    if path is None or (again and photos_to_blame):
        if not (photos_to_blame or weights_to_blame):  # what was saved has finite weights
            lines += _set_aside(run, run.guard.last_good)
        why = "came again after the run went back" if again else "came before a usable checkpoint"
        advice = (
            "check these photos"
            if photos_to_blame
            else "try a smaller --lr or --clip-grad, more --warmup-epochs, or --precision fp32"
        )
        raise RunError(
            f"the trouble of step {step} {why}:\n  "
            + "\n  ".join(lines)
            + f"\nsee {_report_path(run)}; {advice}"
        )
    content = load_checkpoint(path)
    restore(run, path, content)
    run.guard.rolled_back(run.step)
    lines += _set_aside(run, run.step)
    if log is not None:
        log.roll_back(run.step)
        log.record({"step": run.step, "went_back_from": step})
        for line in (*lines, f"going back from step {step} to step {run.step}"):
            log.say(line)


def _set_aside(run: Run, step: int) -> list[str]:
    """Take checkpoints after `step` out of the line; on rank 0, says so."""
    if run.world_size > 1:
        dist.barrier()  # until all have read the checkpoint that they return to
    taken = checkpoints.set_aside(run.folder, step) if run.rank == 0 and step >= 0 else []
    if not taken:
        return []
    return [f"saved after step {step}, no longer used: {', '.join(taken)} (the newest is now"
            f" {checkpoints.DIVERGED})"]  # fmt: skip


def _report(run: Run, step: int, dtype: torch.dtype | None) -> tuple[list[str], bool, bool]:
    """Repeat the step on the same batch: what was found, in words and as a file, and whether on any
    rank pixels, or weights in memory, are not finite."""
    epoch, place = divmod(step, run.loader.steps_per_epoch)
    seed_step(run, step)
    scale = run.scaler.get_scale() if run.scaler is not None else 1.0
    batch = next(run.loader.epoch(epoch, place))
    report = diagnose(run.ibot, batch, epoch, dtype, scale)
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
