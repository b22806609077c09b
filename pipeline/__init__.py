"""Photos -> a batch of crops and masks, on the device, before it is asked for."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ibeton.pipeline.batch import Batch
    from ibeton.pipeline.config import PipelineConfig
    from ibeton.pipeline.loader import Loader, build_loader

__all__ = ["Batch", "Loader", "PipelineConfig", "build_loader"]


def __getattr__(name: str) -> Any:
    """Import on demand: the doctor must run where torch is missing, and the converter's worker
    processes have no use for it."""
    if name not in __all__:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    from ibeton.pipeline import batch, config, loader

    return next(getattr(m, name) for m in (batch, config, loader) if hasattr(m, name))
