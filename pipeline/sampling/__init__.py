"""What is random, by (seed, epoch, sample): order, crop draws, masks."""

from typing import TYPE_CHECKING

from ibeton.lazy import exports

if TYPE_CHECKING:
    from ibeton.pipeline.sampling.draws import (
        DRAW,
        ViewSpec,
        draw_batch,
        draw_views,
        published_views,
        spec_table,
        stack_shape,
    )
    from ibeton.pipeline.sampling.masks import KeyDraws, MaskConfig, draw_mask_reference, draw_masks
    from ibeton.pipeline.sampling.order import epoch_order, rank_batches, steps_per_epoch

__all__ = [
    "DRAW",
    "KeyDraws",
    "MaskConfig",
    "ViewSpec",
    "draw_batch",
    "draw_mask_reference",
    "draw_masks",
    "draw_views",
    "epoch_order",
    "published_views",
    "rank_batches",
    "spec_table",
    "stack_shape",
    "steps_per_epoch",
]

__getattr__ = exports(
    __name__,
    {
        "draws": (
            "DRAW",
            "ViewSpec",
            "draw_batch",
            "draw_views",
            "published_views",
            "spec_table",
            "stack_shape",
        ),
        "masks": (
            "KeyDraws",
            "MaskConfig",
            "draw_mask_reference",
            "draw_masks",
        ),
        "order": (
            "epoch_order",
            "rank_batches",
            "steps_per_epoch",
        ),
    },
)
