"""Settings of the model side: one dataclass, from which the command line is made too."""

from collections.abc import Iterator
from dataclasses import dataclass

from ibeton.options import flag, option, refuse, too_low, unknown_choices

# name -> (embed_dim, depth, num_heads), as published
ARCHITECTURES = {
    "vit_t": (192, 12, 3),
    "vit_s": (384, 12, 6),
    "vit_b": (768, 12, 12),
    "vit_l": (1024, 24, 16),
}
# name -> window; all else is Swin-T's, as published
SWINS = {"swin_t7": 7, "swin_t14": 14}
# names in the published code and, before a suffix, in timm
PUBLISHED_NAMES = {
    **{"vit_t": "vit_tiny", "vit_s": "vit_small", "vit_b": "vit_base", "vit_l": "vit_large"},
    **dict.fromkeys(SWINS, "swin_tiny"),
}
SWIN_DIM = 768  # width of an output token, eight times that of the first stage
SWIN_PATCH = 32  # side of an output token in pixels, and of a mask's cell
ONLY_VIT = (
    *("depth", "num_heads", "mlp_ratio", "qkv_bias", "layer_scale", "mean_pool"),
    "recompute",
)
HEAD_NORMS = ("none", "ln", "bn")
ACTIVATIONS = ("gelu", "relu")
RECOMPUTE = ("auto", "on", "off")
GRAPHS = ("auto", "on", "off")
KERNELS = ("auto", "off")
MOST = 1000  # layers, or local views: more would not fit in any memory
MOST_GLOBAL = 15  # views: with more, gradients of logits could overflow in fp16 (FP16_LIFT)
_AT_LEAST: dict[tuple[str, ...], float] = {
    ("embed_dim", "depth", "num_heads", "local_crops_number"): 0,
    ("warmup_teacher_temp_epochs", "pred_start_epoch", "layer_scale"): 0,
    ("patch_size", "image_size", "hidden_dim", "bottleneck_dim", "head_layers", "epochs"): 1,
    ("out_dim", "patch_out_dim"): 2,
    ("lambda1", "lambda2"): 0,
    ("micro_steps", "global_crops_number"): 1,
}
TEMPERATURES = (
    *("teacher_temp", "warmup_teacher_temp", "student_temp"),
    *("teacher_patch_temp", "warmup_teacher_patch_temp"),
)


@dataclass
class ModelConfig:
    """Backbone, head and loss. Defaults are the published ViT-S/16 recipe of 800 epochs."""

    arch: str = option("vit_s", "backbone", (*ARCHITECTURES, *SWINS))
    embed_dim: int = option(0, "backbone width C (0: as the architecture says)")
    depth: int = option(0, "backbone blocks (0: as the architecture says)")
    num_heads: int = option(0, "attention heads (0: as the architecture says)")
    mlp_ratio: float = option(4.0, "width of a block's MLP over C")
    qkv_bias: bool = option(True, "biases of query, key and value")
    patch_size: int = option(16, "side of a patch in pixels")
    image_size: int = option(224, "side in pixels that the position table is made for")
    drop_path: float = option(0.1, "stochastic depth of the student's last block")
    layer_scale: float = option(0.0, "initial layer scale (0: no layer scale)")
    mean_pool: bool = option(False, "class output is the normed mean of the patch tokens")
    micro_steps: int = option(1, "parts of a batch, one after the other: less memory, same step")
    checkpoint_blocks: bool = option(False, "compute blocks again in the backward: less memory")
    recompute: str = option(
        "auto",
        "norms and GELUs in the backward: a third less memory, 7 % more time on an H100 (auto: on a"
        " CPU, and on a GPU where the batch needs it)",
        RECOMPUTE,
    )
    kernels: str = option(
        "auto",
        "Triton kernels of the step on a GPU: auto (if they agree there with PyTorch's own"
        " operations, which is tested before the run) or off",
        KERNELS,
    )
    cuda_graphs: str = option(
        "auto", "replay steps as CUDA graphs: auto (with one process), on, or off", GRAPHS
    )

    out_dim: int = option(8192, "prototypes K of the class token")
    patch_out_dim: int = option(8192, "prototypes of patches; out_dim if either head is shared")
    shared_head: bool = option(True, "student: one last layer for class token and patches")
    shared_head_teacher: bool = option(True, "teacher: one last layer for class token and patches")
    norm_last_layer: bool = option(False, "keep the prototypes' norms at one")
    norm_in_head: str = option("none", "norm after the head's hidden layers", HEAD_NORMS)
    act: str = option("gelu", "activation in the head", ACTIVATIONS)
    hidden_dim: int = option(2048, "width of the head's hidden layers")
    bottleneck_dim: int = option(256, "width before the prototypes")
    head_layers: int = option(3, "layers of the head before the prototypes")

    global_crops_number: int = option(2, "global views per image")
    local_crops_number: int = option(10, "local views per image")
    warmup_teacher_temp: float = option(0.04, "class temperature of the teacher at the start")
    teacher_temp: float = option(0.07, "class temperature of the teacher after the warm-up")
    warmup_teacher_patch_temp: float = option(0.04, "patch temperature of the teacher at the start")
    teacher_patch_temp: float = option(0.07, "patch temperature of the teacher after the warm-up")
    warmup_teacher_temp_epochs: int = option(30, "epochs of the temperatures' warm-up")
    student_temp: float = option(0.1, "temperature of the student")
    center_momentum: float = option(0.9, "momentum of the class center")
    center_momentum2: float = option(0.9, "momentum of the patch center")
    lambda1: float = option(1.0, "weight of the class loss")
    lambda2: float = option(1.0, "weight of the patch loss")
    pred_start_epoch: int = option(0, "epoch from which views are masked")
    epochs: int = option(800, "length of the run in epochs")

    def width(self) -> int:
        """Channels C of the backbone's output tokens."""
        if self.arch in SWINS:
            return self.embed_dim or SWIN_DIM
        return self.backbone_shape()[0]

    def backbone_shape(self) -> tuple[int, int, int]:
        """(embed_dim, depth, num_heads) of a ViT: those of `arch`, unless set explicitly."""
        embed_dim, depth, num_heads = ARCHITECTURES[self.arch]
        return self.embed_dim or embed_dim, self.depth or depth, self.num_heads or num_heads

    def patch_prototypes(self) -> int:
        """Prototypes K2 of patches: `out_dim` as soon as one of the two heads is shared."""
        shared = self.shared_head or self.shared_head_teacher
        return self.out_dim if shared else self.patch_out_dim

    def check(self) -> None:
        """Raise ValueError, naming every option whose value cannot work."""
        refuse(self.problems())

    def problems(self) -> Iterator[str]:
        """A sentence per value that cannot work, naming the option."""
        yield from unknown_choices(self)
        yield from self._out_of_range()
        if self.arch in SWINS:
            yield from self._swin_problems()
        elif self.arch in ARCHITECTURES:
            embed_dim, _, num_heads = self.backbone_shape()
            if num_heads > 0 and embed_dim % num_heads:
                yield (
                    f"--embed-dim {embed_dim} is not a multiple of --num-heads {num_heads}:"
                    " every head takes an equal share"
                )
        if self.patch_size > 0 and (
            self.image_size < self.patch_size or self.image_size % self.patch_size
        ):
            yield (
                f"--image-size {self.image_size} is not a multiple of --patch-size"
                f" {self.patch_size}: choose a patch size that divides it"
            )
        if self.shared_head and not self.shared_head_teacher:
            yield (
                "--shared-head with an unshared teacher: the teacher's patch layer would never"
                " be updated; share the teacher's head too"
            )
        if self.global_crops_number == 1 and self.local_crops_number == 0:
            yield (
                "--global-crops-number 1 with --local-crops-number 0 leaves no pair of views"
                " to compare: give at least two views"
            )

    def _swin_problems(self) -> Iterator[str]:
        if self.patch_size != SWIN_PATCH:
            yield (
                f"--patch-size {self.patch_size} with --arch {self.arch}: an output token of Swin,"
                f" and a cell of a mask, has {SWIN_PATCH} pixels; give --patch-size {SWIN_PATCH}"
            )
        if self.embed_dim % 24:
            yield f"--embed-dim {self.embed_dim} of a Swin must be a multiple of 24"
        for name in ONLY_VIT:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                yield f"{flag(name)} is for ViTs: --arch {self.arch} does not take it"

    def _out_of_range(self) -> Iterator[str]:
        yield from too_low(self, _AT_LEAST)
        limits = dict.fromkeys(("depth", "head_layers", "local_crops_number"), MOST)
        for name, most in {**limits, "global_crops_number": MOST_GLOBAL}.items():
            if getattr(self, name) > most:
                yield f"{flag(name)} {getattr(self, name)} must be at most {most}"
        for name in ("drop_path", "center_momentum", "center_momentum2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{flag(name)} {getattr(self, name)} must be in [0, 1)"
        for name in TEMPERATURES:
            if not 0 < getattr(self, name) <= 1:
                yield (
                    f"{flag(name)} {getattr(self, name)} must be above 0 and at most 1: the"
                    " published runs have 0.04 to 0.1"
                )
        if not self.mlp_ratio > 0:
            yield f"--mlp-ratio {self.mlp_ratio} must be above 0"
        if self.warmup_teacher_temp_epochs + self.pred_start_epoch > self.epochs:
            yield (
                f"--warmup-teacher-temp-epochs {self.warmup_teacher_temp_epochs} after"
                f" --pred-start-epoch {self.pred_start_epoch} does not fit in --epochs"
                f" {self.epochs}: shorten the warm-up or train longer"
            )
