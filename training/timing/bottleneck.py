"""What limits a run and what to change, from what was measured."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ibeton.pipeline.loaders import LoaderKind
from ibeton.stages import StageWork
from ibeton.training.timing.speed import MUCH_WAIT, WAITING, Window, loader_ceiling, slowest

_MUCH_COMM = 0.1
_SHORT_EPOCH = 50  # steps: below it, the start of an epoch is a noticeable part
_IDLE = 0.4  # workers of a loader that limits are busier than this
_ALIKE = 1.05  # two changes whose gains differ by less count as equal: the cheaper one is named


@dataclass(frozen=True)
class LoaderResources:
    """What the loader of one process has and could have."""

    kind: LoaderKind | None  # None: not one of the training loaders
    workers: int
    cores: int  # for each process
    on_gpu: bool
    steps_per_epoch: int = 0  # 0: not known


@dataclass(frozen=True)
class Change:
    """Something to change, and the images/s per process it would give."""

    what: str
    images_per_s: float


@dataclass(frozen=True)
class Verdict:
    """`limit`: the stage that limits; "idle" if the loader's workers are idle."""

    limit: str
    text: str
    change: Change | None = None


def verdict(
    window: Window, room: LoaderResources, floors: dict[str, float] | None = None
) -> Verdict:
    """What limits over `window`. `floors`: seconds per step below which a stage cannot go; if they
    are known, the stage with the most to gain is named."""
    share = window.waiting / window.seconds
    if share > MUCH_WAIT:
        return _loader_verdict(window, room, share)
    return _model_verdict(window, floors or {})


def _loader_verdict(window: Window, room: LoaderResources, share: float) -> Verdict:
    head = f"data wait {share:.0%}: "
    own = {name: window.parts.get(name, 0.0) for name in WAITING}
    longest = max(own, key=lambda name: own[name])
    if longest != "wait":
        ms = 1000 * own[longest] / window.steps
        return Verdict(
            longest,
            f"{head}{longest} takes {ms:.3g} ms per step on the training thread itself; crops on a"
            " GPU, or smaller batches in more processes, avoid that",
        )
    busy = {name: e.seconds / (e.workers * window.seconds) for name, e in window.stage_work.items()}
    of_workers = sum(busy[name] for name, e in window.stage_work.items() if e.shared)
    apart = {n: b for n, b in busy.items() if not window.stage_work[n].shared}
    share_busy = {"workers": of_workers} | apart
    fullest = max(share_busy, key=lambda name: share_busy[name])
    if share_busy[fullest] < _IDLE:
        why = (
            "something between batches stalls. Epochs of few steps? Other processes on these cores?"
            " More workers than images in a batch?"
        )
        if 0 < room.steps_per_epoch < _SHORT_EPOCH:
            why = (
                f"an epoch has only {room.steps_per_epoch} steps, and each ends with a save: use"
                " more photos, or a smaller batch"
            )
        return Verdict(
            "idle",
            f"{head}no stage of the loader limits, its {room.workers} worker(s) are busy"
            f" {of_workers:.0%} of the time: {why}",
        )
    limit = fullest
    if fullest == "workers":
        shared = [name for name, e in window.stage_work.items() if e.shared]
        limit = max(shared, key=lambda name: window.stage_work[name].seconds)
    work_done = window.stage_work[limit]
    model = window.images / (window.seconds - window.waiting)
    ms = 1000 * work_done.per_photo
    text = (
        f"{head}{limit} limits: {ms:.3g} ms per photo on each of {work_done.workers} worker(s),"
        f" busy {share_busy[fullest]:.0%} of the time; {window.images_per_s:.4g} images/s per"
        f" process, while the model alone could take {model:.4g}."
    )
    if room.kind and room.kind.faster:
        text += f" {room.kind.faster} is faster: it decodes each photo once."
    change = best_change(window.stage_work, room, window.images_per_s, model)
    if change is None:
        return Verdict(limit, f"{text} All {room.cores} cores are busy: add cores, or a GPU")
    text += f" Change: {change.what}: up to {change.images_per_s:.4g} images/s"
    return Verdict(limit, text, change)


def best_change(
    stage_work: dict[str, StageWork], room: LoaderResources, now: float, most: float
) -> Change | None:
    """The change that speeds up a loader of `now` images/s most; the model takes at most `most`."""
    found = [
        Change(what, min(most, now * loader_ceiling(changed) / loader_ceiling(stage_work)))
        for what, changed in _changes(stage_work, room)
    ]
    if not found:
        return None
    best = max(change.images_per_s for change in found)
    return next(change for change in found if change.images_per_s * _ALIKE >= best)


def _changes(
    stage_work: dict[str, StageWork], room: LoaderResources
) -> list[tuple[str, dict[str, StageWork]]]:
    """Possible changes and the loader's work after each, the cheapest first."""

    def changed(how: Callable[[str, StageWork], StageWork]) -> dict[str, StageWork]:
        return {name: how(name, work_done) for name, work_done in stage_work.items()}

    def scaled(stage: str, factor: float) -> dict[str, StageWork]:
        return changed(lambda n, e: replace(e, seconds=e.seconds * factor) if n == stage else e)

    changes = []
    if room.cores > room.workers:
        more = changed(lambda n, e: replace(e, workers=room.cores) if e.shared else e)
        changes.append((f"--workers {room.cores}, as many as there are cores", more))
    if "read" in stage_work:
        cache = "enough memory for the page cache to hold the photos, or a faster disk"
        changes.append((cache, scaled("read", 0.0)))
    if "crop" in stage_work and stage_work["crop"].shared and room.on_gpu:
        way = (room.kind and room.kind.faster) or "--crops-on gpu"
        changes.append((f"crops on the GPU: {way}", scaled("crop", 0.0)))
    if "decode" in stage_work:
        smaller = "photos stored with half the pixels (pipeline.convert --max-resolution)"
        changes.append((smaller, scaled("decode", 0.5)))
    return changes


def _model_verdict(window: Window, floors: dict[str, float]) -> Verdict:
    parts = {name: s / window.steps for name, s in window.parts.items() if name not in WAITING}
    step = window.seconds / window.steps
    if parts.get("comm", 0.0) > _MUCH_COMM * step:
        return Verdict(
            "comm",
            f"other ranks limit: {parts['comm'] / step:.0%} of the step waits for their gradients;"
            " find the slowest rank, or exchange gradients less often (a larger --batch-size)",
        )
    gain = {name: seconds - floors.get(name, 0.0) for name, seconds in parts.items()}
    limit = max(gain, key=lambda name: gain[name])
    text = f"the model limits: {limit} takes {parts[limit] / step:.0%} of the step"
    if limit not in floors:
        return Verdict(limit, text)
    faster = window.images / window.steps / (step - gain[limit])
    text += (
        f", {parts[limit] / floors[limit]:.3g} times its floor; at the floor the step would give"
        f" {faster:.4g} images/s instead of {window.images_per_s:.4g}"
    )
    return Verdict(limit, text, Change(f"{limit} at its floor", faster))


def rank_line(ranks: list[dict[str, float]]) -> str:
    """The slowest rank in a sentence; empty where none stands out."""
    rank, own, stage, behind = slowest(ranks)
    if behind < MUCH_WAIT * own:
        return ""
    return (
        f"rank {rank} is the slowest: {own:.4g} ms per step of its own work; its {stage} takes"
        f" {behind:.4g} ms more than the mean of the others, which wait for it"
    )
