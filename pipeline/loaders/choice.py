"""Which loader a configuration gets, and where it cuts."""

from pathlib import Path
from typing import TYPE_CHECKING

from ibeton.pipeline.loaders.kinds import LOADERS, LoaderKind

if TYPE_CHECKING:
    import torch

    from ibeton.pipeline.config import PipelineConfig


def _is_beton(paths: tuple[str, ...]) -> bool:
    return all(Path(path).suffix == ".beton" for path in paths)


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
    if not _is_beton(config.data):
        return pil, f"pil, the slowest, as the photos are not in a .beton file; {_faster(config)}"
    if problem:
        return pil, f"pil, slower than ffcv: {problem}"
    where = choose_crops(config, ffcv, device).upper()
    return ffcv, f"ffcv: each photo is decoded once, views are cut on the {where}"


def _asked_for(config: "PipelineConfig", kind: LoaderKind) -> tuple[LoaderKind, str]:
    if not kind.reads_folders and not _is_beton(config.data):
        raise ValueError(f"--loader {kind.name} reads .beton files only; {_faster(config)}")
    if problem := kind.problem():
        raise ValueError(f"--loader {kind.name}: {problem}")
    return kind, f"{kind.name}, by --loader"


def _faster(config: "PipelineConfig") -> str:
    folder = next(path for path in config.data if not _is_beton((path,)))
    return f"to make one: python -m pipeline.convert {folder} photos.beton"


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
