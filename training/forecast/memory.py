"""What a step of a ViT keeps in memory: counted from the model's code, in bytes.

In shapes: T tokens of all views, R rows that the loss looks at, C channels, K prototypes.
"""

from collections.abc import Callable

from ibeton.training.forecast.estimate import FULL, HALF, StepShape, head_widths

_ADAMW = 2  # moments of every weight
# What a process holds on a GPU beside its tensors: context and kernels, and cuBLAS' workspace. From
# experience with torch 2; nvidia-smi shows 0.3 to 0.5 GiB. Not measured here.
CONTEXT = 500 * 2**20
NCCL = 300 * 2**20  # likewise, its buffers
# Allocators' blocks are larger than what is asked for, and free memory lies between them. On a CPU,
# benchmarks/model.py measures 1.12 times what is counted here (vit_s, batch 8), 1.24 times in the
# small (vit_t, batch 4).
SLACK = 1.1


def fixed_bytes(shape: StepShape, processes: int, sharded: bool = False) -> dict[str, float]:
    """What does not grow with the batch: weights and moments in float32, gradients, and the half
    copies that autocast keeps of the student's weights. DDP has its buckets besides. `sharded`:
    each process keeps its part of the moments."""
    student, teacher = shape.weights
    moments = FULL * _ADAMW * student / (processes if sharded else 1)
    found = {
        "weights": float(FULL * (student + teacher)),
        "optimizer": moments,
        "gradients": float(FULL * student * (2 if processes > 1 else 1)),
    }
    if shape.width == HALF:
        found["half copies"] = float(HALF * student)
    return found


def kept_bytes(shape: StepShape) -> float:
    """What the student's forward keeps for the backward, of one part of the batch.

    The last block's MLP has R tokens. `checkpoint_blocks` keeps what enters the blocks.
    """
    channels, depth, _ = shape.model.backbone_shape()
    tokens = shape.tokens()
    if shape.model.checkpoint_blocks:
        blocks = float(depth * tokens * channels * FULL)
    else:
        attention, mlp = _token_bytes(shape)
        keep = 1 - (shape.model.drop_path / 2 if shape.drops else 0.0)
        blocks = tokens * attention + ((depth - 1) * tokens + shape.rows()) * mlp
        blocks = keep * (blocks + (depth - 1) * tokens * attention)
    return blocks + _patches_kept(shape) + _head_kept(shape)


def _token_bytes(shape: StepShape) -> tuple[int, int]:
    """Of each token a block keeps, for its attention: what enters the norm (float32) with mean and
    deviation, query, key, value, what attention gives with its log-sum-exp. For its MLP: what
    enters the norm, and what enters the GELU."""
    channels, _, heads = shape.model.backbone_shape()
    normed = FULL * (channels + 2)
    attention = normed + FULL * heads + shape.width * 4 * channels
    return attention, normed + shape.width * int(channels * shape.model.mlp_ratio)


def _patches_kept(shape: StepShape) -> float:
    """The views cut into patches, in the precision of the products."""
    patches = sum(samples * (tokens - 1) for samples, tokens in shape.packed())
    return patches * shape.model.in_chans * shape.model.patch_size**2 * float(shape.width)


def _head_kept(shape: StepShape) -> float:
    """Of each row: what enters the linear layers and activations, and the unit vector."""
    widths, width = head_widths(shape.model), shape.width
    hidden = 2 * sum(widths[1:-1])
    return shape.rows() * (width * (widths[0] + hidden + widths[-1]) + 2 * FULL * widths[-1])


def passing_bytes(shape: StepShape) -> float:
    """What comes and goes at the peak, the beginning of the backward: logits of student and
    teacher, the gradient that the loss left and the one it becomes, and, in a block, the gradients
    of the tokens (float32), of what enters the GELU, and what leaves it. With `checkpoint_blocks`
    also what that block keeps."""
    channels, _, _ = shape.model.backbone_shape()
    hidden, width = int(channels * shape.model.mlp_ratio), shape.width
    samples = shape.packed()[0][0]
    logits = 3 * shape.rows() + samples + shape.masked_patches()
    block = shape.tokens() * (2 * FULL * channels + 3 * width * hidden)
    if shape.model.checkpoint_blocks:
        block += shape.tokens() * sum(_token_bytes(shape))
    return logits * shape.model.out_dim * width + block


def batch_bytes(shape: StepShape, photo_bytes: float, on_gpu: bool) -> float:
    """Views in float32: the batch in use, and on a GPU the next one, with the photos it is cut from
    (`photo_bytes` decoded) and the cropper's two int32 for each pixel of a view."""
    pixels = shape.pixels()
    views = float(pixels * shape.model.in_chans * FULL)
    if not on_gpu:
        return views
    return 2 * views + 2 * FULL * pixels + shape.images * photo_bytes


def gpu_bytes(
    shape: StepShape, processes: int, photo_bytes: float, sharded: bool = False
) -> dict[str, float]:
    """Memory of a GPU at the peak of a step, by what it is for. `photo_bytes`: one decoded."""
    found = fixed_bytes(shape, processes, sharded)
    found["activations"] = kept_bytes(shape)
    found["passing"] = passing_bytes(shape)
    found["batch"] = batch_bytes(shape, photo_bytes, on_gpu=True)
    found["slack"] = (SLACK - 1) * sum(found.values())
    found["context"] = float(CONTEXT + (NCCL if processes > 1 else 0))
    return found


def cpu_bytes(shape: StepShape, processes: int, sharded: bool = False) -> float:
    """Main memory that steps take beyond the weights, in a process without a GPU."""
    fixed = fixed_bytes(shape, processes, sharded)
    growing = kept_bytes(shape) + passing_bytes(shape) + batch_bytes(shape, 0.0, on_gpu=False)
    return SLACK * (growing + sum(fixed.values()) - fixed["weights"])


def largest_batch(need: Callable[[int], float], room: float) -> int:
    """The most images for which `need(images)` bytes are at most `room`; 0 where none fits."""
    low, high = 0, 1
    while need(high) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if need(middle) <= room else (low, middle)
    return low


def checkpoint_bytes(weights: tuple[int, int]) -> float:
    """A checkpoint: student, teacher, and the moments of AdamW."""
    student, teacher = weights
    return float(FULL * (student * (1 + _ADAMW) + teacher))
