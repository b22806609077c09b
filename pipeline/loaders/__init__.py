"""Loaders: from stored photos to the views of a batch.

`LOADERS` holds each by name, with what others need to know of it. Imports neither torch nor numba.
"""

from ibeton.pipeline.loaders.kinds import LOADERS, LoaderKind, choose_crops, choose_loader

__all__ = ["LOADERS", "LoaderKind", "choose_crops", "choose_loader"]
