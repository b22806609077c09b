"""Pixels and draws -> finished views: compiled, by Pillow (the reference), on a GPU."""

from typing import TYPE_CHECKING

from ibeton.lazy import exports

if TYPE_CHECKING:
    from ibeton.pipeline.crops.cpu import cut_views
    from ibeton.pipeline.crops.gpu import GpuCropper
    from ibeton.pipeline.crops.reference import cut_view_reference, cut_views_reference

__all__ = ["GpuCropper", "cut_view_reference", "cut_views", "cut_views_reference"]

__getattr__ = exports(
    __name__,
    {
        "cpu": ("cut_views",),
        "gpu": ("GpuCropper",),
        "reference": (
            "cut_view_reference",
            "cut_views_reference",
        ),
    },
)
