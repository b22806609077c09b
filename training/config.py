"""Settings of the run itself, the published recipes, and how a command line becomes both."""

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from ibeton.model.config import ARCHITECTURES, SWINS, ModelConfig
from ibeton.options import Parser, add_options, fill, flag, option
from ibeton.pipeline import PipelineConfig

PRECISIONS = ("auto", "fp16", "bf16", "fp32")
OPTIMIZERS = ("adamw", "sgd", "lars")

# What differs from the defaults, which are the published ViT-S/16 recipe (README and code of the
# public repository). Figures marked "memory" are recalled from the paper and could not be checked
# against the released arguments: hold them against a run of yours before you lean on them.
_VIT_B: dict[str, Any] = {
    "arch": "vit_b",
    "epochs": 400,  # memory
    "global_crops_scale": (0.32, 1.0),  # memory
    "local_crops_scale": (0.05, 0.32),  # memory
    "warmup_teacher_temp_epochs": 50,  # memory
    "norm_last_layer": True,  # the code's default
    "freeze_last_layer": 3,  # second-hand, from the released arguments
    "lr": 7.5e-4,  # memory
    "min_lr": 2e-6,  # memory
    "clip_grad": 0.3,  # memory
}
_VIT_L: dict[str, Any] = {**_VIT_B, "arch": "vit_l", "epochs": 250, "freeze_last_layer": 1}
_SWIN_T: dict[str, Any] = {"patch_size": 32, "epochs": 300, "pred_start_epoch": 50}
RECIPES: dict[str, dict[str, Any]] = {
    "vit_t": {"arch": "vit_t"},  # not published: ViT-S's recipe on a smaller backbone
    "vit_s": {"arch": "vit_s"},
    "vit_b": _VIT_B,
    "vit_l": _VIT_L,
    "swin_t7": {**_SWIN_T, "arch": "swin_t7"},  # epochs and start of masking: memory
    "swin_t14": {**_SWIN_T, "arch": "swin_t14"},  # published with a global batch of 1040
    # ImageNet-22K: the lengths are from memory, all else is the 1K recipe.
    "vit_b_22k": {**_VIT_B, "epochs": 80},
    "vit_l_22k": {**_VIT_L, "epochs": 50},
}


@dataclass
class RunConfig:
    """The run: optimization, output, evaluation. Defaults are the published ViT-S/16 recipe."""

    recipe: str = option("", "preset to start from (default: the one of --arch)", tuple(RECIPES))
    output_dir: str = option("", "run folder (default: runs/ARCH)")
    resume: str = option("no", "no, auto (go on if the run folder has a checkpoint), or a file")
    init_from: str = option(
        "", "start student and teacher from the backbone of this file (own, iBOT, DINO or timm)"
    )
    epochs: int = option(800, "length of the run, and of every schedule, in epochs")
    stop_after: int = option(0, "end after so many steps; schedules stay those of --epochs (0: no)")
    max_hours: float = option(0.0, "save and stop after so many hours, with status 85 (0: no)")
    global_batch_size: int = option(
        0, "images a step over all processes, in equal parts (0: --batch-size in each)"
    )
    shard_optimizer: bool = option(False, "each process keeps its part of the optimizer's state")
    lost_after: float = option(60.0, "seconds without a sign of life until a process is given up")
    stall_after: float = option(600.0, "seconds that a step, or its batch, may take")
    device: str = option("auto", "cuda, cuda:N, cpu, or auto")
    precision: str = option("auto", "auto is fp16 on a GPU and fp32 on a CPU", PRECISIONS)
    optimizer: str = option("adamw", "optimizer", OPTIMIZERS)
    lr: float = option(5e-4, "peak learning rate for a global batch of 256, scaled linearly")
    min_lr: float = option(1e-6, "learning rate at the end, not scaled")
    warmup_epochs: int = option(10, "epochs of linear warm-up of the learning rate")
    weight_decay: float = option(0.04, "weight decay at the start")
    weight_decay_end: float = option(0.4, "weight decay at the end of its cosine")
    momentum_teacher: float = option(0.996, "teacher momentum at the start; it ends at 1")
    clip_grad: float = option(3.0, "largest L2 norm of each gradient tensor (0: no clipping)")
    freeze_last_layer: int = option(1, "epochs in which the prototypes stand still")
    save_steps: int = option(0, "save every so many steps too (0: at the end of epochs only)")
    keep_last: int = option(3, "keep so many of the last checkpoints")
    keep_every: int = option(40, "keep a checkpoint of its own every so many epochs (0: none)")
    log_steps: int = option(10, "steps between records in log.jsonl")
    profile: int = option(0, "trace so many early steps into trace.json.gz, for Perfetto (0: no)")
    eval_train: str = option("", "labelled photos for k-NN: the memory (.beton or folder)")
    eval_val: str = option("", "labelled photos for k-NN: the queries (.beton or folder)")
    eval_every: int = option(0, "epochs between k-NN evaluations, also before the first (0: none)")
    eval_k: int = option(20, "neighbors in those evaluations")

    def check(self) -> None:
        """Raise ValueError, naming the option, for values that cannot work."""
        for name in ("epochs", "log_steps", "eval_k", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be at least 1")
        for name in (
            *("stop_after", "save_steps", "keep_every", "eval_every", "freeze_last_layer"),
            *("profile", "max_hours"),
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{flag(name)} must not be negative")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(
                f"--warmup-epochs {self.warmup_epochs} does not fit in --epochs {self.epochs}"
            )
        if self.global_batch_size < 0:
            raise ValueError("--global-batch-size must not be negative")
        if self.init_from and self.resume not in ("no", "auto"):
            raise ValueError("--init-from starts a run, --resume FILE goes on with one: give one")
        if self.lost_after < 5 or self.stall_after < 5:
            raise ValueError("--lost-after and --stall-after must be at least 5 seconds")
        if self.lr <= 0 or self.min_lr < 0 or self.clip_grad < 0:
            raise ValueError("--lr must be above 0, --min-lr and --clip-grad not below")
        if not 0 <= self.momentum_teacher <= 1:
            raise ValueError("--momentum-teacher must be in 0 .. 1")
        if self.eval_every and not (self.eval_train and self.eval_val):
            raise ValueError("--eval-every needs --eval-train and --eval-val, two labelled sets")


@dataclass
class Config:
    """All settings of a run."""

    run: RunConfig
    pipeline: PipelineConfig
    model: ModelConfig

    def resolved(self) -> dict[str, Any]:
        """Every setting by name, for the saved configuration."""
        parts = (self.run, self.pipeline, self.model)
        return {k: v for part in parts for k, v in dataclasses.asdict(part).items()}

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


def from_values(values: dict[str, Any]) -> Config:
    """Defaults <- the recipe of values['recipe'] or values['arch'] <- `values`; checked.

    Raises ValueError, naming the option.
    """
    name = values.get("recipe") or values.get("arch", "vit_s")
    if name not in RECIPES:
        raise ValueError(f"--arch {name}: expected one of {', '.join((*ARCHITECTURES, *SWINS))}")
    merged = {**RECIPES[name], **values}
    # The position table is made for the size of the global views.
    merged.setdefault(
        "image_size", merged.get("global_crops_size", PipelineConfig.global_crops_size)
    )
    config = Config(
        fill(RunConfig, merged), fill(PipelineConfig, merged), fill(ModelConfig, merged)
    )
    config.run.output_dir = config.run.output_dir or f"runs/{name}"
    config.run.check()
    config.pipeline.check()
    config.model.check()
    if config.run.global_batch_size:
        if "batch_size" in values:
            raise ValueError("--batch-size and --global-batch-size: give one of them")
    else:
        config.share_batch(world_size=1)
    return config


def parse(arguments: list[str] | None = None) -> Config:
    """The command line as settings. Raises ValueError, naming the option."""
    parser = Parser(
        prog="train.py",
        description="Pre-train an iBOT backbone. Values not given are the published recipe's.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, RunConfig, PipelineConfig, ModelConfig)
    return from_values(vars(parser.parse_args(arguments)))
