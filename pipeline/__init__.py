"""Photos -> a batch of crops and masks, on the device, before it is asked for."""

from typing import TYPE_CHECKING

from ibeton.lazy import exports

if TYPE_CHECKING:
    from ibeton.pipeline.batch import Batch
    from ibeton.pipeline.config import PipelineConfig
    from ibeton.pipeline.loader import Loader, build_loader

__all__ = ["Batch", "Loader", "PipelineConfig", "build_loader"]

__getattr__ = exports(
    __name__,
    {
        "batch": ("Batch",),
        "config": ("PipelineConfig",),
        "loader": ("Loader", "build_loader"),
    },
)
