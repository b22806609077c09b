"""Settings of the run itself, and how a recipe, a config.json and a command line become all of
them."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ibeton.command import missing_extra
from ibeton.model.config import ARCHITECTURES, SWINS, ModelConfig
from ibeton.options import (
    Parser,
    add_options,
    changes,
    expand,
    fill,
    flag,
    option,
    refuse,
    too_low,
    unknown_choices,
    wrong_types,
)
from ibeton.pipeline import PipelineConfig
from ibeton.published_names import nearest_value
from ibeton.training.log.trackers import TRACKERS, missing_packages
from ibeton.training.recipes import RECIPES, shortened
from ibeton.training.small import SMALL, small_recipe

PRECISIONS = ("auto", "fast", "fp16", "bf16", "fp32")
OPTIMIZERS = ("adamw", "sgd", "lars")
_HIGH_LR = 1.0  # per 256 images; AdamW's recipes have 5e-4, LARS and SGD use up to 0.3
_AT_LEAST: dict[tuple[str, ...], float] = {
    ("epochs", "log_steps", "eval_k", "keep_last"): 1,
    ("stop_after", "save_steps", "keep_every", "eval_every", "freeze_last_layer"): 0,
    ("profile", "max_hours", "global_batch_size", "warmup_epochs", "min_lr", "clip_grad"): 0,
    ("lost_after", "stall_after"): 5,
}
_RETIRED = {"in_chans": 3}  # settings of older runs, with the one value that still holds


@dataclass
class RunConfig:
    """The run: optimization, output, evaluation. Defaults are the published ViT-S/16 recipe."""

    recipe: str = option("", "preset to start from (default: the one of --arch)", (*RECIPES, SMALL))
    output_dir: str = option("", "run folder (default: runs/ARCH)", path=True)
    resume: str = option(
        "no", "no, auto (continue if the run folder has a checkpoint), or a file", path=True
    )
    init_from: str = option(
        "",
        "start student and teacher from the backbone of this file (own, iBOT, DINO or timm)",
        path=True,
    )
    epochs: int = option(800, "length of the run, and of every schedule, in epochs")
    stop_after: int = option(
        0, "stop after this many steps; schedules stay those of --epochs (0: never)"
    )
    max_hours: float = option(0.0, "save and stop after this many hours, with status 85 (0: never)")
    global_batch_size: int = option(
        0, "images per step over all processes, split equally (0: --batch-size in each)"
    )
    shard_optimizer: bool = option(False, "split the optimizer's state among the processes")
    lost_after: float = option(60.0, "seconds without a heartbeat until a process counts as lost")
    stall_after: float = option(600.0, "seconds that a step or its batch may take")
    device: str = option("auto", "cuda, cuda:N, cpu, or auto")
    precision: str = option(
        "auto",
        "auto is fp16 on a GPU and fp32 on a CPU; fast is the same, but bf16 on a CPU that has"
        " instructions for it",
        PRECISIONS,
    )
    optimizer: str = option("adamw", "optimizer", OPTIMIZERS)
    lr: float = option(5e-4, "peak learning rate for a global batch of 256, scaled linearly")
    min_lr: float = option(1e-6, "learning rate at the end, not scaled")
    warmup_epochs: int = option(10, "epochs of linear warm-up of the learning rate")
    weight_decay: float = option(0.04, "weight decay at the start")
    weight_decay_end: float = option(0.4, "weight decay at the end of its cosine")
    momentum_teacher: float = option(0.996, "teacher momentum at the start; it ends at 1")
    adam_beta2: float = option(
        0.999, "AdamW's second beta; a smaller one helps when a run on much data diverges"
    )
    clip_grad: float = option(3.0, "largest L2 norm of each gradient tensor (0: no clipping)")
    freeze_last_layer: int = option(1, "epochs in which the prototypes are frozen")
    save_steps: int = option(0, "also save every so many steps (0: only at the end of epochs)")
    keep_last: int = option(3, "how many of the last checkpoints to keep (at least 2)")
    keep_every: int = option(40, "epochs between checkpoints that are never removed (0: none)")
    log_steps: int = option(10, "steps between records in log.jsonl")
    log_to: tuple[str, ...] = option((), "also send the records to these trackers", TRACKERS)
    profile: int = option(0, "early steps to trace into trace.json.gz, for Perfetto (0: none)")
    eval_train: str = option(
        "", "labeled photos for k-NN: training set (.beton or folder)", path=True
    )
    eval_val: str = option("", "labeled photos for k-NN: queries (.beton or folder)", path=True)
    eval_every: int = option(
        0, "epochs between k-NN evaluations; also one before training (0: none)"
    )
    eval_k: int = option(20, "neighbors in those evaluations")

    def problems(self) -> Iterator[str]:
        """A sentence per value that cannot work, naming the option."""
        yield from unknown_choices(self)
        yield from too_low(self, _AT_LEAST)
        if self.warmup_epochs > self.epochs:
            yield f"--warmup-epochs {self.warmup_epochs} does not fit in --epochs {self.epochs}"
        if not self.lr > 0:
            yield f"--lr {self.lr} must be above 0"
        for name in ("weight_decay", "weight_decay_end", "momentum_teacher"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"{flag(name)} {getattr(self, name)} must be between 0 and 1"
        if not 0 < self.adam_beta2 < 1:
            yield f"--adam-beta2 {self.adam_beta2} must be between 0 and 1"
        if self.eval_every and not (self.eval_train and self.eval_val):
            yield "--eval-every needs --eval-train and --eval-val, two labeled sets"
        if self.eval_every and find_spec("sklearn") is None:
            yield f"--eval-every: {missing_extra('sklearn')}"
        if self.init_from and self.resume not in ("no", "auto"):
            yield "--init-from starts a run, --resume FILE continues one: give one of them"
        if self.resume not in ("no", "auto") and Path(self.resume).is_dir():
            yield (
                f"--resume {self.resume} is a folder: give a checkpoint file in it, or"
                f" --output-dir {self.resume} --resume auto to continue its run"
            )
        yield from missing_packages(self.log_to)


@dataclass
class Config:
    """All settings of a run. `notes`: what to tell the user about them; `recipe`: the settings
    that its recipe gave."""

    run: RunConfig
    pipeline: PipelineConfig
    model: ModelConfig
    notes: list[str] = dataclasses.field(default_factory=list)
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)

    def resolved(self) -> dict[str, Any]:
        """Every setting by name, for the saved configuration."""
        parts = (self.run, self.pipeline, self.model)
        return {k: v for part in parts for k, v in dataclasses.asdict(part).items()}

    def summary(self) -> str:
        """What differs from the recipe, in one line; config.json in the run folder has the rest."""
        name = self.run.recipe or self.model.arch
        recipe = {**_defaults(), **self.recipe}
        changed = changes(self.resolved(), recipe, ("recipe", "arch", "image_size"))
        return f"recipe {name} with {changed}; all settings: {self.run.output_dir}/config.json"

    def share_batch(self, world_size: int) -> None:
        """Give each of `world_size` processes its part of --global-batch-size, if that is given.
        Raises ValueError where the images cannot be divided, naming the options."""
        whole = self.run.global_batch_size
        if whole % world_size:
            raise ValueError(
                f"--global-batch-size {whole} cannot be shared by {world_size} processes: give a"
                " multiple of their number"
            )
        if whole:
            self.pipeline.batch_size = whole // world_size
        batch, parts = self.pipeline.batch_size, self.model.micro_steps
        if batch % parts:
            raise ValueError(
                f"--micro-steps {parts} does not divide --batch-size {batch}"
                + (f", the part of each of {world_size} processes" if whole else "")
            )


_PARTS = (RunConfig, PipelineConfig, ModelConfig)


def from_values(values: dict[str, Any], preset: dict[str, Any] | None = None) -> Config:
    """Defaults <- the recipe of values["recipe"] or values["arch"] <- `preset` <- `values`.

    In a run that is too short for the recipe's warm-ups, those that `values` does not hold are
    shortened, with a note. Raises ValueError, naming every option whose value cannot work.
    """
    base, values = _with_data(preset or {}), _with_data(values)
    refuse(wrong_types({**base, **values}, *_PARTS))
    # The preset's recipe may be of another architecture, or of another version.
    if values.get("arch") or base.get("recipe") not in (*RECIPES, SMALL):
        base.pop("recipe", None)
    name = values.get("recipe") or values.get("arch")
    name = name or base.get("recipe") or base.get("arch", "vit_s")
    if name == SMALL and (data := values.get("data") or base.get("data")):
        recipe = small_recipe(data, {**base, **values}.get("device", RunConfig.device))
    elif name in (*RECIPES, SMALL):
        recipe = RECIPES.get(name, {})
    else:
        raise ValueError(f"--arch {name}: {nearest_value(name, [*ARCHITECTURES, *SWINS])}")
    merged = {**recipe, **base, **values}
    # The position table is made for the size of the global views.
    merged.setdefault(
        "image_size", merged.get("global_crops_size", PipelineConfig.global_crops_size)
    )
    long, notes = _defaults() | merged, []
    if shorter := {k: v for k, v in shortened(long).items() if k not in values}:
        words = ", ".join(f"{flag(name)} {long[name]} to {new}" for name, new in shorter.items())
        epochs = f"--epochs {long['epochs']} is shorter than the recipe's warm-ups"
        notes.append(f"{epochs}: shortened {words}")
        merged |= shorter
    if (lr := merged.get("lr", RunConfig.lr)) > _HIGH_LR:
        notes.append(f"--lr {lr:g} is far above any published rate (5e-4): expect divergence")
    parts = (fill(RunConfig, merged), fill(PipelineConfig, merged), fill(ModelConfig, merged))
    config = Config(*parts, notes, recipe)
    config.run.output_dir = config.run.output_dir or f"runs/{name}"
    problems = [problem for part in parts for problem in part.problems()]
    if "batch_size" in values and config.run.global_batch_size:
        problems.append("--batch-size and --global-batch-size: give one of them")
    refuse(problems)
    if not config.run.global_batch_size:
        config.share_batch(world_size=1)
    return config


def _with_data(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with a single source of photos, as older runs have it, as the one of several."""
    alone = isinstance(values.get("data"), str)
    return {**values, "data": (values["data"],)} if alone else values


def _defaults() -> dict[str, Any]:
    return {f.name: f.default for part in _PARTS for f in dataclasses.fields(part)}


def read_preset(path: str) -> dict[str, Any]:
    """The settings of a config.json, or of the run folder that holds one, to start another run
    from. Where it wrote, and whether it resumed, is left out. Raises FileNotFoundError, or
    ValueError naming the file and its unknown settings."""
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"--config {file} does not exist: give the config.json of a run")
    try:
        values = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        where = f" ({error})" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"--config {file} is not the config.json of a run{where}") from error
    values = {k: v for k, v in values.items() if (k, v) not in _RETIRED.items()}
    if unknown := [name for name in values if name not in _defaults()]:
        raise ValueError(f"--config {file}: unknown setting {', '.join(unknown)}")
    for name in ("output_dir", "resume"):
        values.pop(name, None)
    return values


def parse(arguments: list[str] | None = None) -> Config:
    """The command line as settings. Raises ValueError, naming the options."""
    parser = Parser(
        prog="train.py",
        description="Pre-train an iBOT backbone. Values not given are the published recipe's.",
    )
    parser.add_argument(
        "--config", type=expand, help="start from the settings of a run: its config.json or folder"
    )
    add_options(parser, *_PARTS)
    values = vars(parser.parse_args(arguments))
    path = values.pop("config")
    if path is None:
        return from_values(values)
    if "recipe" in values:
        raise ValueError("--config and --recipe: give one of them")
    preset = read_preset(path)
    # A batch given one way replaces one given the other way; the position table follows the views.
    if preset.get("global_batch_size") and "batch_size" not in values:
        preset.pop("batch_size", None)
    if "batch_size" in values:
        preset.pop("global_batch_size", None)
    if preset.get("image_size") == preset.get("global_crops_size"):
        preset.pop("image_size", None)
    return from_values(values, preset)
