"""What a step of a ViT costs: operations and bytes of every stage, and from rates the seconds.

Each product of matrices, each attention and each pass over tokens takes the longer of its
operations over the matrix rate and its bytes over the bandwidth (the roofline). Written down here
from the model's code: `plain` is `model.reference`, the published step done the obvious way.

In shapes: T tokens of all views, R rows that the loss looks at, C channels, K prototypes.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ibeton.model.backbones.blocks import Shapes
from ibeton.model.config import SWINS, ModelConfig
from ibeton.pipeline.loaders import LOADERS
from ibeton.training.config import Config

FULL, HALF = 4, 2  # bytes of a number
# Launches of our step, counted once under a TorchDispatchMode: views and shapes left out.
_LAUNCHES, _LAUNCHES_A_BLOCK = 200, 80
_PLAIN_LOSS = 16  # float32 passes over the patch logits, forward and backward
# A pixel of a view cut on the GPU, in int32: resized one way and written, both ways, six passes of
# the blur in half of the views, and three float32 written (pipeline/crops/gpu.py).
_CROP = 8 + 8 + 24 + 12
_OPTIMIZER, _EMA = 10, 3  # passes over the weights: see benchmarks/harness/throughput_floors.py


class Op(NamedTuple):
    """Operations (two a multiply-add) of matrix products, bytes read and written, and whether the
    products are those of fused attention."""

    flops: float
    bytes: float
    fused: bool = False


class Rates(NamedTuple):
    """What a device really does: FLOP/s of matrix products, and of fused attention, whose products
    are narrow and wait for a softmax; bytes/s of everything else; seconds of the host for a launch
    (0 on a CPU)."""

    flops: float
    attention: float
    memory: float
    launch: float = 0.0


@dataclass(frozen=True)
class StepShape:
    """Sizes of a step of one process. `width`: bytes of a number in matrix products. `weights` of
    the student and of the teacher. `drops`: stochastic depth leaves samples out, as it does on a
    CPU. `crops`: views are cut on the GPU, beside the step. `micro_steps` parts pass one by one."""

    model: ModelConfig
    images: int
    views: Shapes  # (views an image, tokens of a view) of each crop size, global first
    masked: float  # mean share of the global views' patches
    width: int
    weights: tuple[int, int]
    drops: bool = False
    crops: bool = False
    plain: bool = False

    def packed(self) -> Shapes:
        """(samples, tokens a sample) of each crop size, of one part of the batch."""
        return [(n * self.images // self.model.micro_steps, t) for n, t in self.views]

    def tokens(self) -> int:
        """T of one part."""
        return sum(samples * tokens for samples, tokens in self.packed())

    def pixels(self) -> int:
        """Pixels of all views of the whole batch."""
        patches = sum(views * (tokens - 1) for views, tokens in self.views)
        return self.images * patches * self.model.patch_size**2

    def masked_patches(self) -> float:
        """M of one part."""
        samples, tokens = self.packed()[0]
        return self.masked * samples * (tokens - 1)

    def rows(self) -> float:
        """R of one part: class tokens of all views, and masked patches."""
        return sum(samples for samples, _ in self.packed()) + self.masked_patches()


def step_shape(
    config: Config, weights: tuple[int, int], width: int, on_gpu: bool, plain: bool = False
) -> StepShape:
    """The step of `config`. `plain`: the published one, whose loader cuts the views too. Raises
    ValueError for Swin, whose windows are not counted here."""
    data, model = config.pipeline, config.model
    if model.arch in SWINS:
        raise ValueError(f"--arch {model.arch}: only ViTs are estimated")
    cuts_on_gpu = data.loader not in LOADERS or LOADERS[data.loader].cuts_on_gpu  # or auto
    return StepShape(
        model=model,
        images=data.batch_size,
        views=[
            (data.global_crops_number, 1 + (data.global_crops_size // data.patch_size) ** 2),
            (data.local_crops_number, 1 + (data.local_crops_size // data.patch_size) ** 2),
        ],
        masked=sum(data.pred_ratio) / len(data.pred_ratio),
        width=width,
        weights=weights,
        drops=not on_gpu and not plain,
        crops=on_gpu and not plain and cuts_on_gpu and data.crops_on != "cpu",
        plain=plain,
    )


def weights_of(student: torch.nn.Module, teacher: torch.nn.Module) -> tuple[int, int]:
    """Numbers in the parameters of each."""
    counts = [sum(p.numel() for p in network.parameters()) for network in (student, teacher)]
    return counts[0], counts[1]


def step_ops(shape: StepShape) -> dict[str, list[Op]]:
    """What every stage of a step does."""
    teacher, student, backward = _networks(shape)
    parts = shape.model.micro_steps
    student_weights, teacher_weights = shape.weights
    crops = [_over(shape.pixels(), _CROP)] if shape.crops else []
    return {
        "crop": crops,
        "teacher": teacher * parts,
        "student": student * parts,
        "loss": [_loss(shape)] * parts,
        "backward": backward * parts,
        "optimizer": [_over(student_weights, _OPTIMIZER * FULL)],
        "ema": [_over(teacher_weights, _EMA * FULL)],
    }


def flops(ops: dict[str, list[Op]]) -> float:
    """Operations of a step."""
    return sum(op.flops for stage in ops.values() for op in stage)


def stage_seconds(ops: dict[str, list[Op]], rates: Rates) -> dict[str, float]:
    """Seconds of the device for every stage."""

    def seconds(op: Op) -> float:
        rate = rates.attention if op.fused else rates.flops
        return max(op.flops / rate, op.bytes / rates.memory)

    return {name: sum(map(seconds, stage)) for name, stage in ops.items()}


def step_seconds(shape: StepShape, rates: Rates) -> float:
    """Seconds of a step: the device's, or the host's for its launches where these take longer."""
    launches = _LAUNCHES + _LAUNCHES_A_BLOCK * shape.model.backbone_shape()[1]
    host = launches * shape.model.micro_steps * rates.launch
    return max(host, sum(stage_seconds(step_ops(shape), rates).values()))


def _networks(shape: StepShape) -> tuple[list[Op], list[Op], list[Op]]:
    """Forward of the teacher and of the student, and the backward."""
    _, depth, _ = shape.model.backbone_shape()
    everything, seen = shape.packed(), shape.packed()[:1]
    teacher = [_patches(shape, seen)]
    student, backward = [_patches(shape, everything)], [_patches(shape, everything)]
    all_tokens, rows = shape.tokens(), shape.rows()
    for i in range(depth):
        keep = 1.0
        if shape.drops:
            keep -= shape.model.drop_path * i / max(1, depth - 1)
        wanted = rows if i == depth - 1 and not shape.plain else all_tokens
        forward = _block(shape, everything, wanted, keep)
        student += forward
        backward += _block_backward(shape, everything, wanted, keep)
        if shape.model.checkpoint_blocks:
            backward += forward
        teacher += _block(shape, seen, seen[0][0] * seen[0][1], 1.0)
    global_tokens = seen[0][0] * seen[0][1]
    if shape.plain:  # every token of every view meets the prototypes
        teacher += _head(shape, global_tokens, global_tokens)
        student += _head(shape, all_tokens, all_tokens)
    else:
        teacher += _head(shape, global_tokens, seen[0][0] + shape.masked_patches() + 1)
        student += _head(shape, rows, rows)
    if shape.plain:  # which no one asks about the patches of local views
        locals_ = sum(samples for samples, _ in everything[1:])
        return teacher, student, backward + 2 * _head(shape, all_tokens, global_tokens + locals_)
    return teacher, student, backward + 2 * _head(shape, rows, rows)


def _product(m: float, k: float, n: float, width: int) -> Op:
    return Op(2 * m * k * n, width * (m * k + k * n + m * n))


def _over(values: float, bytes_each: float) -> Op:
    return Op(0.0, values * bytes_each)


def _patches(shape: StepShape, views: Shapes) -> Op:
    """Patches of the images to embeddings; in the backward, gradient of the weights alone."""
    pixels = shape.model.in_chans * shape.model.patch_size**2
    patches = sum(samples * (tokens - 1) for samples, tokens in views)
    return _product(patches, pixels, shape.model.backbone_shape()[0], shape.width)


def _block(shape: StepShape, views: Shapes, wanted: float, keep: float) -> list[Op]:
    """A block's forward on the share `keep` of the samples; its MLP on `wanted` tokens."""
    channels, _, _ = shape.model.backbone_shape()
    hidden, width = int(channels * shape.model.mlp_ratio), shape.width
    tokens, wanted = keep * sum(samples * t for samples, t in views), keep * wanted
    cast = FULL + width if width < FULL else 0
    norm, residual = 2 * FULL + cast, 2 * FULL + width
    if keep < 1:  # samples gathered, and what comes of them added to a copy of all
        residual += 4 * FULL
    return [
        _over(tokens * channels, norm),
        _product(tokens, channels, 3 * channels, width),
        *_attention(shape, views, keep, 1),
        _product(tokens, channels, channels, width),
        _over(tokens * channels, 2 * width),  # crop sizes put together
        _over(tokens * channels, residual),
        _over(wanted * channels, norm),
        _product(wanted, channels, hidden, width),
        _over(wanted * hidden, 2 * width),
        _product(wanted, hidden, channels, width),
        _over(wanted * channels, residual),
    ]


def _block_backward(shape: StepShape, views: Shapes, wanted: float, keep: float) -> list[Op]:
    """Each product twice, for its input and its weights; norms and GELU again unless `plain`."""
    channels, _, _ = shape.model.backbone_shape()
    hidden, width = int(channels * shape.model.mlp_ratio), shape.width
    tokens, wanted = keep * sum(samples * t for samples, t in views), keep * wanted
    again = 0 if shape.plain else 1
    residual = 3 * FULL + width + (9 * FULL if keep < 1 else 0)
    # Norm: computed again; its gradient reads two and writes one; sums of gradients for the bias.
    norm = (2 * again + 3) * FULL + 2 * width
    products = [
        _product(wanted, channels, hidden, width),
        _product(wanted, hidden, channels, width),
        _product(tokens, channels, 3 * channels, width),
        _product(tokens, channels, channels, width),
    ]
    return [
        *2 * products,
        *_attention(shape, views, keep, 2),
        _over(wanted * hidden, (2 * again + 3 + 1) * width),  # GELU, its gradient, the bias
        _over((tokens + wanted) * channels, norm),
        _over((tokens + wanted) * channels, residual),
        # Of query, key and value: put together, also those of the crop sizes; sum for the bias.
        _over(3 * tokens * channels, 5 * width),
    ]


def _attention(shape: StepShape, views: Shapes, keep: float, passes: int) -> list[Op]:
    """Forward (passes = 1) or backward (2). Fused, the backward multiplies the scores again: five
    products for two. Plainly, scores go through memory: product, softmax in float32, product."""
    channels, _, heads = shape.model.backbone_shape()
    tokens = keep * sum(samples * t for samples, t in views)
    pairs = keep * sum(samples * t**2 for samples, t in views)
    in_and_out = 4 * passes * shape.width * tokens * channels
    if not shape.plain:
        return [Op((4 if passes == 1 else 10) * pairs * channels, in_and_out, fused=True)]
    a_score = 24 if shape.width == HALF else 16
    return [Op(4 * passes * pairs * channels, in_and_out), _over(heads * pairs, passes * a_score)]


def head_widths(model: ModelConfig) -> list[int]:
    """Widths of the head's layers, from the tokens to the bottleneck."""
    hidden = [model.hidden_dim] * (model.head_layers - 1)
    return [model.backbone_shape()[0], *hidden, model.bottleneck_dim]


def _head(shape: StepShape, tokens: float, rows: float) -> list[Op]:
    """MLP of `tokens`, prototypes of `rows`."""
    model, width = shape.model, shape.width
    widths = head_widths(model)
    ops = [_product(tokens, k, n, width) for k, n in itertools.pairwise(widths)]
    ops += [_over(tokens * n, 2 * width) for n in widths[1:-1]]
    return [*ops, _product(rows, model.bottleneck_dim, model.out_dim, width)]


def _loss(shape: StepShape) -> Op:
    """Fused: logits of student and teacher are read, a gradient is written."""
    samples, tokens = shape.packed()[0]
    if shape.plain:
        return _over(samples * (tokens - 1) * shape.model.out_dim, _PLAIN_LOSS * FULL)
    values = 2 * shape.rows() + samples + shape.masked_patches()
    return _over(values * shape.model.out_dim, shape.width)
