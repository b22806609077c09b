"""The loaders by name, all that the rest of the program needs to know of each, and which of them a
configuration gets.

A new loader is one entry in LOADERS and one file beside this one. Nothing here imports torch or
numba before a loader is built: the doctor asks which loaders can run.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ibeton.workers import cores

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ibeton.pipeline.config import PipelineConfig
    from ibeton.pipeline.loaders.context import Cutter, LoaderContext
    from ibeton.pipeline.loaders.gpu_decode import GpuDecoding
    from ibeton.pipeline.sampling.draws import ViewSpec
    from ibeton.pipeline.store.photos import Photos

INSTALL_TURBOJPEG = "sudo apt-get install libturbojpeg0"
INSTALL_DALI = "pip install -c constraints.txt -e '.[dali]'"


# --decode ("auto" or "gpu"), photos, the GPU, workers -> the GPU's part, if any, and the reason
ShareDecoding = Callable[[str, "Photos", "torch.device", int], "tuple[GpuDecoding | None, str]"]


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
    decodes_on_gpu: bool = False  # where it cuts there
    share_decoding: "ShareDecoding | None" = None  # with a GPU, as --decode says
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


def _share_with_nvjpeg(
    wish: str, photos: "Photos", device: "torch.device", workers: int
) -> "tuple[GpuDecoding | None, str]":
    from ibeton.pipeline.loaders.gpu_decode import NvJpeg, choose_decoding, nvjpeg_problem
    from ibeton.pipeline.store.beton import BetonReader

    assert isinstance(photos, BetonReader)
    if problem := nvjpeg_problem(device):
        if wish == "gpu":
            raise ValueError(f"--decode gpu {problem}")
        return None, ""
    return choose_decoding(wish, photos, NvJpeg(device), workers)


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
            share_decoding=_share_with_nvjpeg,
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


def choose_loader(config: "PipelineConfig", device: "torch.device") -> tuple[LoaderKind, str]:
    """The loader for `config` and why, in one line.

    Without --loader: ffcv for .beton files; where its library is missing, dali on CUDA devices; pil
    for the rest. Raises ValueError where the loader that --loader names cannot run.
    """
    if config.loader in LOADERS:
        return _asked_for(config, LOADERS[config.loader])
    ffcv, dali, pil = (LOADERS[name] for name in ("ffcv", "dali", "pil"))
    problem = ffcv.problem()
    if problem and device.type == "cuda" and not dali.problem():
        by = "by nvJPEG" if choose_crops(config, dali, device) == "gpu" else "on the CPU"
        return dali, f"dali: each photo is decoded once, {by}; {problem}"
    if Path(config.data).suffix != ".beton":
        return pil, f"pil, the slowest, as the photos are not in a .beton file; {_faster(config)}"
    if problem:
        return pil, f"pil, slower than ffcv: {problem}"
    where = choose_crops(config, ffcv, device).upper()
    return ffcv, f"ffcv: each photo is decoded once, views are cut on the {where}"


def _asked_for(config: "PipelineConfig", kind: LoaderKind) -> tuple[LoaderKind, str]:
    if not kind.reads_folders and Path(config.data).suffix != ".beton":
        raise ValueError(f"--loader {kind.name} reads .beton files only; {_faster(config)}")
    if problem := kind.problem():
        raise ValueError(f"--loader {kind.name}: {problem}")
    return kind, f"{kind.name}, by --loader"


def _faster(config: "PipelineConfig") -> str:
    return f"to make one: python -m pipeline.convert {config.data} photos.beton"


def choose_crops(config: "PipelineConfig", kind: LoaderKind, device: "torch.device") -> str:
    """Where a loader cuts views: "gpu" or "cpu". Raises ValueError where --crops-on gpu is asked
    for and impossible."""
    able = device.type == "cuda" and kind.cuts_on_gpu
    if config.crops_on == "gpu" and not able:
        why = f"the device is {device.type}"
        if not kind.cuts_on_gpu:
            why = f"the {kind.name} loader cuts on the CPU"
        raise ValueError(f"--crops-on gpu: {why}")
    return "gpu" if able and config.crops_on != "cpu" else "cpu"


def choose_decoding(
    config: "PipelineConfig", kind: LoaderKind, photos: "Photos", device: "torch.device"
) -> "tuple[GpuDecoding | None, str]":
    """The GPU's part in decoding, if any, and the reason in one line, empty if nothing was chosen.
    Raises ValueError if --decode gpu is impossible."""
    on_gpu = choose_crops(config, kind, device) == "gpu"
    if config.decode == "cpu" or (kind.decodes_on_gpu and on_gpu):
        return None, ""
    if kind.share_decoding is not None and on_gpu:
        return kind.share_decoding(config.decode, photos, device, config.workers or cores())
    if config.decode == "gpu":
        why = "needs views cut on the GPU: leave out --crops-on cpu"
        if device.type != "cuda":
            why = "needs an NVIDIA GPU and a CUDA build of torch; use --decode cpu"
        elif not kind.cuts_on_gpu:
            why = f"is not possible with the {kind.name} loader; use {kind.faster}"
        raise ValueError(f"--decode gpu {why}")
    return None, ""
