"""Decoded photos + draws -> finished views, on the GPU: a whole batch in ten launches.

The host turns the draws into one record per view (`gpu_kernels.CUT`) and copies all at once. The
kernels do what the CPU croppers do, in the same integers, so the views are equal. Launches, each
for all views of the batch:

1. taps of both resizes       2. first resize, photos -> scratch
3. second resize, flip, color ops before the contrast, sum of the gray
4. contrast and the ops after it; normalize the views without a blur
5. - 10. box blurs of the blurred views, three along rows, three along columns; normalize
"""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
import triton
from torch import Tensor

from ibeton.pipeline.compiled import compiled
from ibeton.pipeline.crops import gpu_kernels as kernels
from ibeton.pipeline.crops.blur import box_radius
from ibeton.pipeline.sampling.draws import (
    BRIGHTNESS,
    CONTRAST,
    DRAW,
    HUE,
    JITTER_ORDERS,
    SATURATION,
    ViewSpec,
)

_MAX_SIZE = 2048  # the sum of a view's gray must fit into 32 bits
_MAX_SIDE, _MAX_BYTES = 65535, 2**31 - 1  # of one photo: JPEG's limit; offsets in it are int32
_MAX_SHARE = 16  # programs per view
_F32 = np.float32


class GpuCropper:
    """Cuts batches of photos into global and local views on one GPU.

    `views` are the V global, then the L local ones; `mean` and `std` three values each on the 0..1
    scale; `dtype` of the output float16 or float32. Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        views: list[ViewSpec],
        global_views: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        _check_views(views, global_views)
        self._device, self._dtype = _full_device(device), dtype
        self._global_views = global_views
        self._sizes = np.array([view.size for view in views], np.int64)
        # The same float32 operations as batch.normalized, so that float32 views are equal to its.
        means, stds = torch.tensor(mean).float(), torch.tensor(std).float()
        self._norm = torch.cat([1 / (255 * stds), -means / stds]).to(self._device)
        blocks = triton.cdiv(int(self._sizes.max()) ** 2, kernels.BLOCK_PIXELS)
        self._share = min(_MAX_SHARE, blocks)

    def cut(
        self,
        pixels: Tensor,
        offsets: np.ndarray,
        heights: np.ndarray,
        widths: np.ndarray,
        draws: np.ndarray,
    ) -> tuple[Tensor, Tensor]:
        """All views of B photos, on the current stream; the host does not wait.

        `pixels` uint8 [bytes] on the device holds the photos, each [H, W, 3], from byte
        `offsets[b]` on; offsets, `heights` and `widths` are integers [B] on the host, `draws` DRAW
        [B, V + L]. Returns normalized global [V, B, 3, S, S] and local [L, B, 3, s, s] views in
        fresh memory. Raises ValueError if an argument has another form, a photo ends behind
        `pixels`, or a box leaves its photo.
        """
        offsets, heights, widths = (np.asarray(x, np.int64) for x in (offsets, heights, widths))
        self._check_pixels(pixels)
        _check_photos(pixels.numel(), offsets, heights, widths)
        _check_draws(draws, heights, widths, len(self._sizes))
        out = torch.empty(3 * self._total(len(draws)), dtype=self._dtype, device=self._device)
        if len(draws):
            plan = plan_cuts(draws, offsets, widths, self._sizes)
            # Triton launches on the current device, whatever device the tensors are on.
            with torch.cuda.device(self._device) if pixels.is_cuda else nullcontext():
                self._launch(pixels, plan, out)
        return self._split(out, len(draws))

    def _launch(self, pixels: Tensor, plan: np.ndarray, out: Tensor) -> None:
        views, area = self._total(len(plan) // len(self._sizes)), plan["area"].astype(np.int64)
        scratch = self._int32(max(int(area.sum()), views))
        taps = self._int32(int(_table_sizes(plan).sum()))
        packed, gray_sums = self._int32(views), self._int32(len(plan))
        longs, ints, blurred = self._sent(plan)

        shared = {"SHARE": self._share, "BLOCK": kernels.BLOCK_PIXELS, **kernels.EXACT}
        grid = (len(plan) * self._share,)
        kernels.tap_tables[(len(plan) * 2,)](
            longs, ints, taps, gray_sums, BLOCK=kernels.BLOCK_TAPS, **kernels.EXACT
        )
        kernels.first_resize[grid](pixels, longs, ints, taps, scratch, **shared)
        kernels.second_resize[grid](scratch, longs, ints, taps, packed, gray_sums, **shared)
        kernels.colors[grid](longs, ints, gray_sums, self._norm, packed, out, **shared)
        if not len(blurred):
            return
        source, target = packed, scratch  # the half-resized boxes are done
        for number in range(6):
            kernels.box_blur[(len(blurred) * self._share,)](
                *(blurred, longs, ints, self._norm, source, target, out),
                **{"UPRIGHT": number >= 3, "LAST": number == 5, **shared},
            )
            source, target = target, source

    def _sent(self, plan: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """The records as int64 and as int32, and the list of blurred views, in one copy."""
        blurred = np.flatnonzero(plan["blurred"]).astype(np.int32)
        start = -(-plan.nbytes // 16) * 16  # aligned, so that kernels are compiled only once
        sent = torch.empty(
            start + blurred.nbytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda"
        )
        sent.numpy()[: plan.nbytes] = plan.view(np.uint8)
        sent.numpy()[start:] = blurred.view(np.uint8)
        sent = sent.to(self._device, non_blocking=True)
        records = sent[: plan.nbytes]
        return records.view(torch.int64), records.view(torch.int32), sent[start:].view(torch.int32)

    def _total(self, images: int) -> int:
        """Pixels of all views of `images` photos."""
        return images * int((self._sizes**2).sum())

    def _split(self, out: Tensor, images: int) -> tuple[Tensor, Tensor]:
        parts, start = [], 0
        for sizes in (self._sizes[: self._global_views], self._sizes[self._global_views :]):
            size = int(sizes[0]) if len(sizes) else 1
            shape = (len(sizes), images, 3, size, size)
            count = int(np.prod(shape))
            parts.append(out[start : start + count].view(shape))
            start += count
        return parts[0], parts[1]

    def _int32(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int32, device=self._device)

    def _check_pixels(self, pixels: Tensor) -> None:
        if pixels.dtype != torch.uint8 or pixels.dim() != 1 or not pixels.is_contiguous():
            raise ValueError(
                f"pixels: {pixels.dtype} {list(pixels.shape)}, expected contiguous uint8 [bytes]"
            )
        if pixels.device != self._device:
            raise ValueError(f"pixels are on {pixels.device}, the cropper works on {self._device}")


def plan_cuts(
    draws: np.ndarray, offsets: np.ndarray, widths: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """CUT records [B * V] of the draws [B, V], photo by photo; `offsets` (bytes) and `widths` of
    the photos int64 [B], `sizes` of the views int64 [V], in pixels."""
    images, views = draws.shape
    plan = np.zeros(images * views, kernels.CUT)
    photo = np.repeat(np.arange(images), views)
    draw = draws.reshape(-1)
    stride = 3 * widths[photo]
    plan["pixels"] = offsets[photo] + draw["top"] * stride + 3 * draw["left"].astype(np.int64)
    # View-major: view v of photo b lies behind all photos' views before v, and b views v.
    starts = (np.cumsum(sizes**2) - sizes**2) * images
    plan["view"] = (starts + np.arange(images)[:, None] * sizes**2).reshape(-1)
    plan["size"] = np.tile(sizes, images)
    plan["flip"], plan["solarize"] = draw["flip"], draw["solarize"]
    _plan_resize(plan, draw, stride)
    _plan_colors(plan, draw)
    for name, values in zip(
        ("blurred", "whole", "weight", "edge"), _boxes(draw["blur_radius"]).T, strict=True
    ):
        plan[name] = values
    return plan


def _plan_resize(plan: np.ndarray, draw: np.ndarray, stride: np.ndarray) -> None:
    height, width, size = (
        x.astype(np.int64) for x in (draw["height"], draw["width"], plan["size"])
    )
    rows_first = (height > size) & (height - size > 2 * (width - size))  # see resize.resized_crop
    either = np.where(rows_first, height, width), np.where(rows_first, width, height)
    plan["rows_first"] = rows_first
    plan["source"] = source = np.stack(either, axis=1)
    # A cubic reaches 2 pixels to either side, and further by the reduction; one for the rounding.
    plan["taps"] = np.ceil(4 * np.maximum(source / size[:, None], 1)) + 1
    plan["across"][:, 0] = np.where(rows_first, 3, stride)
    plan["step"][:, 0] = np.where(rows_first, stride, 3)
    plan["across"][:, 1] = np.where(rows_first, width, 1)
    plan["step"][:, 1] = np.where(rows_first, 1, size)
    plan["columns"] = np.where(rows_first, width, size)
    plan["area"] = area = size * source[:, 1]
    plan["scratch"] = np.cumsum(area) - area
    tables = _table_sizes(plan).reshape(-1)
    plan["table"] = (np.cumsum(tables) - tables).reshape(-1, 2)


def _table_sizes(plan: np.ndarray) -> np.ndarray:
    """Entries of each view's two tables of taps, int64 [N, 2]."""
    return (plan["taps"].astype(np.int64) + 1) * plan["size"][:, None]


def _plan_colors(plan: np.ndarray, draw: np.ndarray) -> None:
    """The chain has the four ops of the jitter, then the gray, a saturation of 0."""
    order, jitter = JITTER_ORDERS[draw["order"]], draw["jitter"] != 0
    hue = np.trunc(draw["hue"].astype(np.float64) * 255)  # torchvision's: towards zero
    by_op = np.stack([draw["brightness"], draw["contrast"], draw["saturation"], hue], axis=1)
    factors = np.take_along_axis(by_op, order.astype(np.intp), axis=1)
    off = (order == HUE) & (draw["hue"] == 0)[:, None]  # strength 0: brightness times 1
    plan["ops"][:, :4] = np.where(off, BRIGHTNESS, order)
    plan["factors"][:, :4] = np.where(off, 1.0, factors)
    plan["ops"][:, 4] = SATURATION
    plan["begin"] = np.where(jitter, 0, 4)
    plan["split"] = np.where(jitter, np.argmax(order == CONTRAST, axis=1), 4)
    plan["end"] = np.where(draw["gray"], 5, 4)


@compiled
def _boxes(radii: np.ndarray) -> np.ndarray:
    """Gaussian radii float32 [N] -> int32 [N, 4]: whether there is a blur; of its boxes, the pixels
    to either side of the middle one, and the weights of these and of the ends in 24 bits."""
    out = np.zeros((len(radii), 4), np.int32)
    for n in range(len(radii)):
        radius = box_radius(radii[n]) if radii[n] > 0 else _F32(0.0)
        if radius > 0:
            whole = int(radius)
            weight = np.int64(_F32(1 << 24) / _F32(radius * _F32(2.0) + _F32(1.0)))
            out[n] = (1, whole, weight, ((1 << 24) - (whole * 2 + 1) * weight) // 2)
    return out


def _full_device(device: torch.device | str) -> torch.device:
    """The device with its number."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.device(
            "cuda", torch.cuda.current_device() if device.index is None else device.index
        )
    if triton.knobs.runtime.interpret:
        return device
    raise ValueError(f"device {device}: the Triton croppers need a CUDA device")


def _check_views(views: list[ViewSpec], global_views: int) -> None:
    for name, part in (("global", views[:global_views]), ("local", views[global_views:])):
        sizes = {view.size for view in part}
        if len(sizes) > 1 or not all(1 <= size <= _MAX_SIZE for size in sizes):
            raise ValueError(
                f"sizes of the {name} views {sorted(sizes)}: expected one of 1 .. {_MAX_SIZE}"
            )


def _check_photos(total: int, offsets: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> None:
    shapes = [x.shape for x in (offsets, heights, widths)]
    if len(set(shapes)) > 1 or offsets.ndim != 1:
        raise ValueError(f"offsets, heights, widths have shapes {shapes}: expected [B] each")
    size = 3 * heights * widths
    wrong = (np.minimum(heights, widths) < 1) | (np.maximum(heights, widths) > _MAX_SIDE)
    wrong |= (size > _MAX_BYTES) | (offsets < 0) | (offsets + size > total)
    if wrong.any():
        b = int(np.argmax(wrong))
        raise ValueError(
            f"photo {b} of {heights[b]} x {widths[b]} pixels at byte {offsets[b]}: expected one "
            f"inside the {total} bytes of pixels, with sides of 1 .. {_MAX_SIDE}, below 2 GiB"
        )


def _check_draws(draws: np.ndarray, heights: np.ndarray, widths: np.ndarray, views: int) -> None:
    if draws.dtype != DRAW or draws.shape != (len(heights), views):
        raise ValueError(
            f"draws {draws.dtype} {list(draws.shape)}: expected DRAW [{len(heights)}, {views}]"
        )
    top, left, height, width = (
        draws[name].astype(np.int64) for name in ("top", "left", "height", "width")
    )
    wrong = (top < 0) | (left < 0) | (height < 1) | (width < 1)
    wrong |= (top + height > heights[:, None]) | (left + width > widths[:, None])
    if wrong.any():
        b, v = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"box of view {v} of photo {b}, {height[b, v]} x {width[b, v]} at ({top[b, v]}, "
            f"{left[b, v]}), leaves the photo of {heights[b]} x {widths[b]}"
        )
    if (draws["order"] >= len(JITTER_ORDERS)).any():
        raise ValueError(f"draws: an order of {draws['order'].max()}, expected 0 .. 23")
    for name in ("brightness", "contrast", "saturation", "hue", "blur_radius"):
        if not np.isfinite(draws[name]).all():
            raise ValueError(f"draws: {name} is not finite everywhere")
