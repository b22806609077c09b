"""Settings that all dense tasks share, and their command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ibeton.options import Parser, add_options, fill, flag, option, refuse, too_low
from ibeton.training.config import PRECISIONS
from ibeton.workers import cores

_AT_LEAST: dict[tuple[str, ...], float] = {
    ("batch_size", "save_steps", "log_steps"): 1,
    ("lr", "weight_decay", "warmup_steps", "workers", "eval_every", "pictures", "max_hours"): 0,
}


@dataclass
class DenseConfig:
    """Training of a dense task."""

    checkpoint: str = option("", "checkpoint of the backbone, of train.py or imported", path=True)
    network: str = option("teacher", "which of its networks", ("teacher", "student"))
    untrained: bool = option(False, "the same backbone with new weights, to compare with")
    data: str = option("", "folder of the data set", path=True)
    output_dir: str = option("", "folder of the run", path=True)
    resume: str = option("no", "no, or auto: continue the run of --output-dir", ("no", "auto"))
    batch_size: int = option(16, "images per step, over all processes")
    lr: float = option(0.0, "peak learning rate (0: as published for the architecture)")
    layer_decay: float = option(
        0.0, "learning rate of a block over that of the next (0: as published)"
    )
    weight_decay: float = option(0.05, "weight decay of AdamW")
    drop_path: float = option(0.1, "stochastic depth of the last block")
    warmup_steps: int = option(1500, "steps of linear warm-up")
    precision: str = option("auto", "auto: fp16 on GPUs, fp32 on CPUs", PRECISIONS)
    device: str = option("auto", "cuda, cuda:N, cpu, or auto")
    workers: int = option(min(4, cores()), "processes that load images, per training process")
    seed: int = option(0, "seed of heads, order and augmentation")
    save_steps: int = option(2000, "steps between checkpoints")
    log_steps: int = option(50, "steps between lines of the log")
    eval_every: int = option(0, "steps between evaluations (0: only at the end)")
    max_hours: float = option(0.0, "stop after so many hours (0: no limit)")
    pictures: int = option(8, "photos to draw beside truth and prediction")

    def check(self) -> None:
        """Raise ValueError, naming the option, for values that cannot work."""
        for name in ("checkpoint", "data", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{flag(name)} is missing")
        refuse(too_low(self, _AT_LEAST))
        if not 0 <= self.drop_path < 1 or not 0 <= self.layer_decay <= 1:
            raise ValueError("--drop-path must be in [0, 1) and --layer-decay in [0, 1]")


Settings = TypeVar("Settings", bound=DenseConfig)


def parse(cls: type[Settings], program: str, about: str, argv: Sequence[str] | None) -> Settings:
    """The settings of a command line, checked; its errors end the program with status 2."""
    parser = Parser(prog=program, description=about)
    add_options(parser, cls)
    config = fill(cls, vars(parser.parse_args(argv)))
    try:
        config.check()
    except ValueError as error:
        parser.error(str(error))
    return config
