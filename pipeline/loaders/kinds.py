"""The loaders by name, all that the rest of the program needs to know of each, and which of them a
configuration gets.

A new loader is one entry in LOADERS and one file beside this one. Nothing here imports torch or
numba before a loader is built: the doctor asks which loaders can run.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibeton.workers import cores

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ibeton.pipeline.config import PipelineConfig
    from ibeton.pipeline.loaders.context import Cutter, LoaderContext, PhotoSource
    from ibeton.pipeline.loaders.gpu_decode import GpuDecoding
    from ibeton.pipeline.store.photos import Photos

INSTALL_TURBOJPEG = "sudo apt-get install libturbojpeg0"
INSTALL_DALI = "pip install -c constraints.txt -e '.[dali]'"
# --decode ("auto" or "gpu"), photos, the GPU, workers -> the GPU's part, if any, and the reason
ShareDecoding = Callable[[str, "Photos", "torch.device", int], "tuple[GpuDecoding | None, str]"]


@dataclass(frozen=True)
class LoaderKind:
    """One way from photos to views.

    crops: makes it with views cut on the CPU.
    pixels: makes what decodes photos for croppers on a GPU; None if it cuts on the CPU only.
    problem: why it cannot run here, and what to install; empty if it can.
    decode: one photo to uint8 [H, W, 3] as this loader does it, to be timed.
    decode_rate, crop_rate: photos/s of one core, decoded, and cut into 2 x 224 + 10 x 96 views on
    the CPU as well, from one older machine; 0 if not measured.
    """

    name: str
    about: str
    crops: "Callable[[LoaderContext], Cutter]"
    pixels: "Callable[[LoaderContext], PhotoSource] | None" = None
    problem: Callable[[], str] = lambda: ""
    decode: "Callable[[Photos, int], np.ndarray]" = lambda photos, index: photos.pixels(index)
    decode_rate: float = 0.0
    crop_rate: float = 0.0
    reads_folders: bool = True  # or .beton files alone
    decodes_on_gpu: bool = False  # if it cuts there
    share_decoding: ShareDecoding | None = None  # with a GPU, as --decode says
    worker_processes: bool = False  # which need shared memory, and to be shielded from signals
    faster: str = ""  # what to use in its place, to be faster

    def build(self, context: "LoaderContext") -> "Cutter":
        """The loader, which cuts on `context.device`."""
        if context.device.type == "cpu" or self.pixels is None:
            return self.crops(context)
        from ibeton.pipeline.loaders.gpu_stream import GpuCrops

        return GpuCrops(context, self.pixels(context))


def _later(module: str, name: str) -> Callable[..., Any]:
    """A class or function of a module beside this one, which is imported when that is called."""

    def call(*arguments: Any) -> Any:
        found = importlib.import_module(f"ibeton.pipeline.loaders.{module}")
        return getattr(found, name)(*arguments)

    return call


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
        state = "not installed" if isinstance(error, ModuleNotFoundError) else f"broken ({error})"
        return f"nvidia-dali is {state}: `{INSTALL_DALI}` installs it, `ibeton doctor` explains"
    return ""


def _decode_by_turbojpeg(photos: "Photos", index: int) -> "np.ndarray":
    from ibeton.pipeline.store.beton import JPG, BetonReader
    from ibeton.pipeline.store.photos import turbo_pixels

    if isinstance(photos, BetonReader) and photos.modes[index] == JPG:
        return turbo_pixels(photos, index)
    return photos.pixels(index)


LOADERS = {
    kind.name: kind
    for kind in (
        LoaderKind(
            name="ffcv",
            about=".beton files only",
            crops=_later("ffcv", "FfcvCrops"),
            pixels=_later("ffcv", "FfcvPixels"),
            problem=turbojpeg_problem,
            decode=_decode_by_turbojpeg,
            decode_rate=572,
            crop_rate=197,
            share_decoding=_later("gpu_decode", "share_with_nvjpeg"),
            reads_folders=False,
        ),
        LoaderKind(
            name="dali",
            about="NVIDIA's decoders",
            crops=_later("dali", "DaliCrops"),
            pixels=_later("dali", "DaliPixels"),
            problem=dali_problem,
            decodes_on_gpu=True,
        ),
        LoaderKind(
            name="pil",
            about="the published recipe",
            crops=_later("pil", "PilCrops"),
            decode_rate=410,
            crop_rate=33,
            worker_processes=True,
            faster="a .beton file with --loader ffcv",
        ),
    )
}
RECIPE = "pil"  # what others are compared with


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
    if _folders(config):
        return pil, f"pil, the slowest loader, as {_unconverted(config)}"
    if problem:
        return pil, f"pil, slower than ffcv: {problem}"
    where = choose_crops(config, ffcv, device).upper()
    return ffcv, f"ffcv: each photo is decoded once, views are cut on the {where}"


def _asked_for(config: "PipelineConfig", kind: LoaderKind) -> tuple[LoaderKind, str]:
    if not kind.reads_folders and _folders(config):
        raise ValueError(f"--loader {kind.name} reads .beton files only: {_unconverted(config)}")
    if problem := kind.problem():
        raise ValueError(f"--loader {kind.name}: {problem}")
    return kind, f"{kind.name}, by --loader"


def _unconverted(config: "PipelineConfig") -> str:
    """Which sources are not in a .beton file, and how to convert them."""
    folders = _folders(config)
    others = "" if len(folders) == len(config.data) == 1 else f" of {', '.join(folders)}"
    return (
        f"the photos{others} are not in a .beton file; to make one:"
        f" ibeton convert {folders[0]} photos.beton"
    )


def _folders(config: "PipelineConfig") -> list[str]:
    """The sources that are not .beton files."""
    return [path for path in config.data if Path(path).suffix != ".beton"]


def choose_crops(config: "PipelineConfig", kind: LoaderKind, device: "torch.device") -> str:
    """Where a loader cuts views: "gpu" or "cpu". Raises ValueError where --crops-on gpu is asked
    for and impossible."""
    able = device.type == "cuda" and kind.pixels is not None
    if config.crops_on == "gpu" and not able:
        why = f"the device is {device.type}"
        if kind.pixels is None:
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
        elif kind.pixels is None:
            why = f"is not possible with the {kind.name} loader; use {kind.faster}"
        raise ValueError(f"--decode gpu {why}")
    return None, ""
