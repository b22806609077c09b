"""Settings of fine-tuning, and the published recipes by task, architecture and data set.

Sources: iBOT (arXiv 2111.07832, appendix) and its published scripts; DeiT (arXiv 2012.12877) for
transfer. Values that are not given come from the recipe; any option overrides one.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ibeton.command import amount
from ibeton.options import Parser, add_options, changes, fill, flag, option, refuse, too_low
from ibeton.training.config import PRECISIONS

RECIPES = ("imagenet", "semi", "transfer")
DATASETS = ("cifar10", "cifar100", "flowers", "cars", "inat18", "inat19")
INTERPOLATIONS = ("bilinear", "bicubic")

# ImageNet-1K fine-tuning by architecture: what differs from the defaults, which are ViT-S's.
_IMAGENET: dict[str, dict[str, Any]] = {
    "vit_b": {"epochs": 100, "drop_path": 0.2, "layer_decay": 0.65},
    "vit_l": {"epochs": 50, "drop_path": 0.4, "warmup_epochs": 5},
}
# DeiT's recipe, and what the few-label runs share with it.
_DEIT: dict[str, Any] = {
    "epochs": 1000,
    "lr_batch_size": 512,
    "min_lr": 1e-5,
    "warmup_epochs": 5,
    "layer_decay": 1.0,
    "head_init_scale": 1.0,
    "test_interpolation": "bicubic",
}
_SEMI = {**_DEIT, "lr": 5e-6, "ema": 0.99996, "projection": True, "repeats": 3}
_TRANSFER = {**_DEIT, "lr": 7.5e-6, "batch_size": 768, "mix_images": 96, "repeats": 3}
_BY_DATASET: dict[str, dict[str, Any]] = {
    "cars": {"lr": 7.5e-5},
    "inat18": {"epochs": 360, "erasing": 0.1},
    "inat19": {"epochs": 360, "erasing": 0.1},
}
_VIT_S_RATES = {"inat18": 5e-5, "inat19": 2.5e-5}
_AT_LEAST: dict[tuple[str, ...], float] = {
    ("epochs", "batch_size", "accumulate", "lr_batch_size", "mix_images", "repeats"): 1,
    ("eval_every", "eval_batch_size", "keep_last", "log_steps"): 1,
    ("stop_after", "image_size", "min_lr", "warmup_lr", "weight_decay", "clip_grad", "mixup"): 0,
    ("cutmix", "save_steps", "workers", "seed", "label_seed", "max_hours", "head_init_scale"): 0,
    ("lost_after", "stall_after"): 5,
}
SWEEP = (8e-4, 9e-4, 1e-3, 2e-3)  # the learning rates that the paper tries on ImageNet-1K


@dataclass
class FinetuneConfig:
    """Fine-tuning. Defaults are the published ImageNet-1K recipe of ViT-S/16."""

    checkpoint: str = option("", "checkpoint of a run to start from, or an imported one", path=True)
    network: str = option("teacher", "which of the checkpoint's networks", ("teacher", "student"))
    from_scratch: bool = option(False, "take the checkpoint's architecture with fresh weights")
    recipe: str = option(
        "",
        "preset to start from (default: transfer with --dataset, semi with --labels, or imagenet)",
        RECIPES,
    )
    train: str = option("", "labeled photos to train on: class folders, tar or .beton", path=True)
    val: str = option("", "labeled photos to evaluate on: class folders, tar or .beton", path=True)
    dataset: str = option("", "a data set in its own layout, instead of two folders", DATASETS)
    root: str = option("", "folder that holds the files of --dataset", path=True)
    labels: str = option(
        "",
        "train on these photos only: a file of names (SimCLR's lists), or a share such as 0.1",
        path=True,
    )
    label_seed: int = option(0, "seed of the photos that a share draws")
    output_dir: str = option("", "run folder (default: runs/finetune-ARCH)", path=True)
    resume: str = option(
        "no", "no, or auto (continue if the run folder has a checkpoint)", ("no", "auto")
    )

    epochs: int = option(200, "length of the run in epochs")
    stop_after: int = option(0, "stop after this many steps; schedules follow --epochs (0: no)")
    max_hours: float = option(0.0, "save and stop after so many hours, with status 85 (0: no)")
    batch_size: int = option(1024, "images per step over all processes")
    accumulate: int = option(1, "gradient accumulation steps; more of them use less memory")
    image_size: int = option(0, "side of a view in pixels (0: as the backbone was built for)")
    lr: float = option(1e-3, "peak learning rate for a batch of --lr-batch-size, scaled linearly")
    lr_batch_size: int = option(1024, "images per step that --lr is meant for")
    sweep: tuple[float, ...] = option(
        (), f"learning rates to try, one run each (published: {' '.join(f'{r:g}' for r in SWEEP)})"
    )
    min_lr: float = option(1e-6, "learning rate at the end, not scaled")
    warmup_lr: float = option(1e-6, "learning rate at the start of the warm-up, not scaled")
    warmup_epochs: int = option(20, "epochs of linear warm-up of the learning rate")
    weight_decay: float = option(0.05, "weight decay; none for biases, norms and position tables")
    layer_decay: float = option(
        0.75, "layer-wise decay: learning rate of a block over the next one's"
    )
    clip_grad: float = option(0.0, "largest L2 norm of all gradients together (0: no clipping)")
    drop_path: float = option(0.1, "stochastic depth of the last block")
    projection: bool = option(False, "start from the projection head's first layer, too")
    head_init_scale: float = option(0.001, "factor of the classifier's initial weights")
    ema: float = option(0.0, "decay of a moving average of the weights, scored too (0: none)")

    scale: tuple[float, float] = option((0.08, 1.0), "area of a training crop, from to")
    augment: str = option("rand-m9-mstd0.5-inc1", "RandAugment in timm's spelling ('': none)")
    erasing: float = option(0.25, "share of views with an erased box")
    mixup: float = option(0.8, "alpha of mixup (0: none)")
    cutmix: float = option(1.0, "alpha of cutmix (0: none)")
    mix_images: int = option(128, "images that share a draw of mixup, cutmix and erasing")
    smoothing: float = option(0.1, "label smoothing")
    repeats: int = option(1, "views of a photo in a batch, decoded once (repeated augmentation)")
    test_interpolation: str = option(
        "bilinear", "interpolation of the resize before testing", INTERPOLATIONS
    )

    seed: int = option(0, "seed of order, views, mixing, and the classifier's weights")
    device: str = option("auto", "cuda, cuda:N, cpu, or auto")
    precision: str = option("auto", "auto is fp16 on a GPU and fp32 on a CPU", PRECISIONS)
    workers: int = option(0, "threads that decode and augment (0: one per core of the process)")
    checkpoint_blocks: bool = option(False, "compute blocks again in the backward: less memory")
    eval_every: int = option(1, "epochs between scores on --val")
    eval_batch_size: int = option(128, "images per forward pass when scoring")
    save_steps: int = option(0, "save every so many steps too (0: at the end of epochs only)")
    keep_last: int = option(2, "how many of the last checkpoints to keep (at least 2)")
    log_steps: int = option(10, "steps between records in log.jsonl")
    lost_after: float = option(60.0, "seconds without a heartbeat after which a process is lost")
    stall_after: float = option(600.0, "seconds that a step, or its batch, may take")

    def problems(self) -> Iterator[str]:
        """A sentence per value that cannot work, naming the option."""
        if self.dataset:
            if not self.root or self.train or self.val:
                yield f"--dataset {self.dataset} takes --root, and no --train or --val"
        elif not (self.train and self.val) or self.root:
            yield "give --train and --val, or --dataset and --root"
        yield from too_low(self, _AT_LEAST)
        for name in ("drop_path", "ema", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{flag(name)} {getattr(self, name)} must be in [0, 1)"
        for name in ("layer_decay", "lr"):
            if getattr(self, name) <= 0:
                yield f"{flag(name)} {getattr(self, name)} must be above 0"
        if any(rate <= 0 for rate in self.sweep) or len(set(self.sweep)) < len(self.sweep):
            yield "--sweep takes different learning rates above 0"
        if not 0 <= self.erasing <= 1:
            yield f"--erasing {self.erasing}: expected a share, 0 to 1"
        low, high = self.scale
        if not 0 < low <= high <= 1:
            yield f"--scale {low} {high}: expected 0 < from <= to <= 1"
        if not 0 <= self.warmup_epochs <= self.epochs:
            yield f"--warmup-epochs {self.warmup_epochs} does not fit in --epochs {self.epochs}"

    def summary(self, arch: str) -> str:
        """What differs from the recipe, in one line; config.json in the run folder has the rest."""
        usual = asdict(fill(FinetuneConfig, recipe(self.recipe, arch, self.dataset)))
        changed = changes(asdict(self), usual, ("recipe",))
        return f"recipe {self.recipe} with {changed}; all settings: {self.output_dir}/config.json"

    def mixes(self) -> bool:
        """Whether photos of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def shares(self, world_size: int) -> tuple[int, int]:
        """Images per step of each process, and images per group that mixes. Raises ValueError,
        naming the options, where the batch cannot be divided."""
        parts = world_size * self.accumulate
        if self.batch_size % parts:
            raise ValueError(
                f"--batch-size {self.batch_size} cannot be divided among"
                f" {amount(world_size, 'process', 'processes')}"
                f" in {amount(self.accumulate, 'part')} each: give a multiple of {parts}"
            )
        part = self.batch_size // parts
        group = min(self.mix_images, part)
        if part % group or (self.mixes() and group % 2):
            raise ValueError(
                f"--mix-images {self.mix_images} must be even and divide the {part} images that"
                " pass at a time (--batch-size over processes and --accumulate)"
            )
        return part * self.accumulate, group

    def peak_lr(self) -> float:
        """The peak learning rate of this batch size."""
        return self.lr * self.batch_size / self.lr_batch_size


def recipe(name: str, arch: str, dataset: str) -> dict[str, Any]:
    """What a recipe sets beside the defaults."""
    if name == "imagenet":
        return dict(_IMAGENET.get(arch, {}))
    if name == "semi":
        return dict(_SEMI)
    if name != "transfer":
        raise ValueError(f"--recipe {name}: expected one of {', '.join(RECIPES)}")
    found = {**_TRANSFER, **_BY_DATASET.get(dataset, {})}
    if arch == "vit_s" and dataset in _VIT_S_RATES:
        found["lr"] = _VIT_S_RATES[dataset]
    return found


def from_values(values: dict[str, Any], arch: str) -> FinetuneConfig:
    """Defaults <- the recipe of the task and `arch` <- `values`; checked. Raises ValueError."""
    dataset = values.get("dataset", "")
    task = "transfer" if dataset else "semi" if values.get("labels") else "imagenet"
    name = values.get("recipe") or task
    config = fill(FinetuneConfig, {**recipe(name, arch, dataset), **values, "recipe": name})
    config.output_dir = config.output_dir or f"runs/finetune-{dataset or arch}"
    refuse(config.problems())
    return config


def parse(arguments: list[str] | None = None) -> dict[str, Any]:
    """The options that the command line gives, by name."""
    parser = Parser(
        prog="python -m evaluation.finetune",
        description="Train a backbone further with labels. Values not given are the recipe's.",
    )
    add_options(parser, FinetuneConfig)
    return vars(parser.parse_args(arguments))
