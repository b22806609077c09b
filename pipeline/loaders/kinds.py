"""The loaders by name, and all that the rest of the program needs to know of each.

A new loader is one entry in LOADERS and one file beside this one. Nothing here imports torch or
numba before a loader is built: the doctor asks which loaders can run.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from ibeton.pipeline.loaders.context import Cutter, LoaderContext
    from ibeton.pipeline.sampling.draws import ViewSpec
    from ibeton.pipeline.store.photos import Photos

INSTALL_TURBOJPEG = "sudo apt-get install libturbojpeg0"
INSTALL_DALI = "pip install -c constraints.txt -e '.[dali]'"


@dataclass(frozen=True)
class LoaderKind:
    """One way from photos to views.

    build: makes it; `context.device` says where views are cut.
    problem: why it cannot run here, and what to install; empty where it can.
    decode: one photo to uint8 [H, W, 3] as this loader does it, to be timed.
    cut: all views of such a photo on the CPU, likewise: photo, draws, views, count of global ones.
    """

    name: str
    about: str
    build: "Callable[[LoaderContext], Cutter]"
    problem: Callable[[], str]
    decode: "Callable[[Photos, int], np.ndarray]"
    cut: "Callable[[np.ndarray, np.ndarray, list[ViewSpec], int], None]"
    reads_folders: bool = True  # or .beton files alone
    cuts_on_gpu: bool = True  # where there is one
    decodes_on_gpu: bool = False  # where it cuts there; `decode` then says nothing of its speed
    worker_processes: bool = False  # which need shared memory, and to be shielded from signals
    faster: str = ""  # what to use in its place, to be faster


def turbojpeg_problem() -> str:
    """Why libjpeg-turbo cannot be called here, and what to install; empty where it can."""
    from ibeton.pipeline.store.turbojpeg import library

    try:
        library()
    except OSError as error:
        return f"{error}: `{INSTALL_TURBOJPEG}` or `make ffcv` installs it"
    return ""


def dali_problem() -> str:
    """Why NVIDIA DALI cannot be used here, and what to install; empty where it can."""
    try:
        importlib.import_module("nvidia.dali")
    except ImportError as error:  # also where a library that it was built with is gone
        missing = isinstance(error, ModuleNotFoundError)
        state = "not installed" if missing else f"broken ({error})"
        return (
            f"nvidia-dali is {state}: `{INSTALL_DALI}` installs it, `python -m pipeline.doctor`"
            " explains"
        )
    return ""


def _build_ffcv(context: "LoaderContext") -> "Cutter":
    from ibeton.pipeline.loaders.ffcv import FfcvCrops, FfcvPixels

    if context.device.type == "cpu":
        return FfcvCrops(context)
    from ibeton.pipeline.loaders.gpu_stream import GpuCrops

    return GpuCrops(context, FfcvPixels(context, pinned=True))


def _build_dali(context: "LoaderContext") -> "Cutter":
    from ibeton.pipeline.loaders.dali import DaliCrops, DaliPixels

    if context.device.type == "cpu":
        return DaliCrops(context)
    from ibeton.pipeline.loaders.gpu_stream import GpuCrops

    return GpuCrops(context, DaliPixels(context))


def _build_pil(context: "LoaderContext") -> "Cutter":
    from ibeton.pipeline.loaders.pil import PilCrops

    return PilCrops(context)


def _decode_by_turbojpeg(photos: "Photos", index: int) -> "np.ndarray":
    from ibeton.pipeline.store.beton import JPG, BetonReader
    from ibeton.pipeline.store.turbojpeg import Decoder

    if not isinstance(photos, BetonReader) or photos.modes[index] != JPG:
        return photos.pixels(index)
    height, width = int(photos.heights[index]), int(photos.widths[index])
    return Decoder().decode(photos.photo_bytes(index), height, width)


def _decode_by_pillow(photos: "Photos", index: int) -> "np.ndarray":
    return photos.pixels(index)


def _cut_compiled(
    photo: "np.ndarray", draws: "np.ndarray", views: "list[ViewSpec]", global_views: int
) -> None:
    import numpy as np

    from ibeton.pipeline.crops.cpu import cut_views
    from ibeton.pipeline.sampling.draws import stack_shape

    stacks = (views[:global_views], views[global_views:])
    cut_views(photo, draws, *(np.empty(stack_shape(some), np.uint8) for some in stacks))


def _cut_by_pillow(
    photo: "np.ndarray", draws: "np.ndarray", views: "list[ViewSpec]", global_views: int
) -> None:
    from PIL import Image

    from ibeton.pipeline.crops.reference import cut_views_reference

    cut_views_reference(Image.fromarray(photo), draws, [view.size for view in views])


LOADERS = {
    kind.name: kind
    for kind in (
        LoaderKind(
            name="ffcv",
            about=".beton files only",
            build=_build_ffcv,
            problem=turbojpeg_problem,
            decode=_decode_by_turbojpeg,
            cut=_cut_compiled,
            reads_folders=False,
        ),
        LoaderKind(
            name="dali",
            about="NVIDIA's decoders",
            build=_build_dali,
            problem=dali_problem,
            decode=_decode_by_pillow,
            cut=_cut_compiled,
            decodes_on_gpu=True,
        ),
        LoaderKind(
            name="pil",
            about="the published recipe",
            build=_build_pil,
            problem=lambda: "",
            decode=_decode_by_pillow,
            cut=_cut_by_pillow,
            cuts_on_gpu=False,
            worker_processes=True,
            faster="a .beton file and --loader ffcv",
        ),
    )
}
