"""Finds the bottleneck of a run from measured times, and what would change it."""

from dataclasses import dataclass

from ibeton.command import amount
from ibeton.pipeline.loaders import LoaderKind
from ibeton.training.timing.speed import MUCH_WAIT, WAITING, Window, slowest

_MUCH_COMM = 0.1
_SHORT_EPOCH = 50  # steps: below it, the start of an epoch is a noticeable part
_IDLE = 0.4  # workers of a loader that limits are busier than this


@dataclass(frozen=True)
class LoaderResources:
    """What the loader of one process uses and could use."""

    kind: LoaderKind | None  # None: none of the training loaders
    workers: int
    cores: int  # for each process
    on_gpu: bool
    steps_per_epoch: int = 0  # 0: not known


@dataclass(frozen=True)
class Verdict:
    """`limit`: the stage that limits; "idle" if the loader's workers are idle."""

    limit: str
    text: str


def verdict(
    window: Window, room: LoaderResources, floors: dict[str, float] | None = None
) -> Verdict:
    """What limits over `window`. `floors`: the least seconds per step that a stage can take; if
    they are known, the stage with the most to gain is named."""
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
    busy = {"workers": 0.0}  # as shares of the time
    for name, e in window.stage_work.items():
        who = "workers" if e.shared else name
        busy[who] = busy.get(who, 0.0) + e.seconds / (e.workers * window.seconds)
    fullest = max(busy, key=lambda name: busy[name])
    if busy[fullest] < _IDLE:
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
            f"{head}no stage of the loader limits ({amount(room.workers, 'worker')}"
            f" busy {busy['workers']:.0%} of the time): {why}",
        )
    limit = fullest
    if fullest == "workers":
        shared = [name for name, e in window.stage_work.items() if e.shared]
        limit = max(shared, key=lambda name: window.stage_work[name].seconds)
    work_done = window.stage_work[limit]
    model = window.images / (window.seconds - window.waiting)
    ms = 1000 * work_done.per_photo
    text = (
        f"{head}{limit} limits: {ms:.3g} ms per photo on each of"
        f" {amount(work_done.workers, 'worker')}, busy {busy[fullest]:.0%} of the time;"
        f" {window.images_per_s:.4g} images/s per process, while the model alone could take"
        f" {model:.4g}."
    )
    if room.kind and room.kind.faster:
        better = room.kind.faster[0].upper() + room.kind.faster[1:]
        text += f" {better} is faster: it decodes each photo only once."
    return Verdict(limit, f"{text} {_advice(limit, window, room)}")


def _advice(limit: str, window: Window, room: LoaderResources) -> str:
    """What to change about a stage of the loader that limits."""
    shared = window.stage_work[limit].shared
    if limit == "read":
        return "Add memory for the page cache to hold the photos, or take a faster disk"
    if shared and room.cores > room.workers:
        return f"Give --workers {room.cores}, as many as there are cores"
    if limit == "crop" and shared and room.on_gpu:
        return f"Cut on the GPU: {(room.kind and room.kind.faster) or '--crops-on gpu'}"
    advice = "add cores, or a GPU"
    if "decode" in window.stage_work:
        advice = "store smaller photos (ibeton convert --max-resolution), or add cores"
    return f"All {room.cores} cores are busy: {advice}"


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
    return Verdict(limit, text)


def rank_line(ranks: list[dict[str, float]]) -> str:
    """The slowest rank in a sentence; "" if none stands out."""
    rank, own, stage, behind = slowest(ranks)
    if behind < MUCH_WAIT * own:
        return ""
    return (
        f"rank {rank} is the slowest: {own:.4g} ms per step of its own work; its stage '{stage}'"
        f" takes {behind:.4g} ms longer than the mean of the others, which wait for it"
    )
