"""What is installed, what is missing, how to install it, and which loader will be used.

    python -m pipeline.doctor

Needs only Python, because it is run when something is broken. Exits with status 1 if training
cannot start.
"""

import importlib
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ibeton.options import Parser
from ibeton.pipeline.loaders.kinds import INSTALL_DALI, INSTALL_TURBOJPEG, LOADERS
from ibeton.workers import cores

ABOUT = "What is installed, what is missing, how to install it, and which loader will be used."
_REINSTALL = "make setup"
_GET_FFCV = f"{INSTALL_TURBOJPEG}, or make ffcv"

_PACKAGES = (
    *("torch", "torchvision", "numpy", "numba", "PIL", "timm", "rich", "tensorboard"),
    *("safetensors", "matplotlib", "nvidia.dali", "sklearn", "pytest"),
)
_OPTIONAL = ("timm", "matplotlib", "nvidia.dali", "sklearn", "pytest")  # trains without them


@dataclass
class Finding:
    """One line of the report; `fix` says how to install it; empty where all is well."""

    name: str
    state: str
    fix: str = ""
    fatal: bool = False
    cuda: bool = False  # of the device


def check_package(module: str) -> Finding:
    """Import `module` for real: an installed package whose libraries are missing is not usable."""
    try:
        version = getattr(importlib.import_module(module), "__version__", "installed")
    except Exception as error:  # a broken package may raise anything
        reason = "missing" if isinstance(error, ModuleNotFoundError) else f"broken ({error})"
        fix = INSTALL_DALI if module == "nvidia.dali" else _REINSTALL
        return Finding(module, reason, fix, fatal=module not in _OPTIONAL)
    return Finding(module, str(version))


def check_turbojpeg() -> Finding:
    """The library that the ffcv loader decodes with."""
    try:
        problem = LOADERS["ffcv"].problem()
    except ImportError as error:  # numpy or Pillow, which have lines of their own
        return Finding("libturbojpeg", f"unknown without {error.name or 'numpy'}", _REINSTALL)
    return Finding("libturbojpeg", "missing" if problem else "installed", problem and _GET_FFCV)


def check_device() -> Finding:
    """The accelerator, and whether this torch has kernels for it."""
    try:
        import torch
    except Exception:
        return Finding("device", "unknown without torch", _REINSTALL, fatal=True)
    if not torch.cuda.is_available():
        return Finding("device", f"CPU, {cores()} cores (no usable CUDA device)")
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} (sm_{major}{minor})"
    if not has_kernels(torch.cuda.get_arch_list(), 10 * major + minor):
        fix = "pip install 'torch<2.11'" if major == 7 else "pip install --upgrade torch"
        return Finding(
            "device", f"{name}: torch {torch.__version__} has no kernels for it", fix, cuda=True
        )
    return Finding("device", name, cuda=True)


def has_kernels(built: list[str], capability: int) -> bool:
    """Whether code for `built`, such as sm_80 and compute_90, runs on a GPU of sm_`capability`.
    Machine code (sm) runs on later minor versions of its major one, PTX (compute) on all later
    ones. Code with the suffix "a" runs on its own version alone, with "f" as machine code does."""
    for name in built:
        if found := re.fullmatch(r"(sm|compute)_(\d+)([af]?)", name):
            kind, version, suffix = found[1], int(found[2]), found[3]
            same_major = version // 10 == capability // 10
            runs_later = suffix != "a" and (same_major or (kind == "compute" and not suffix))
            if version == capability or (version < capability and runs_later):
                return True
    return False


def loader_line(findings: dict[str, Finding]) -> str:
    """Which loader training will use, in one line."""
    no_ffcv, no_dali = (bool(findings[name].fix) for name in ("libturbojpeg", "nvidia.dali"))
    asked_for = "" if no_dali else "; dali for either, where asked for"
    if not no_ffcv:
        return f"ffcv for .beton files, pil for photo folders{asked_for}"
    to_get = f"to get ffcv: {_GET_FFCV}"
    if not no_dali and findings["device"].cuda:
        return f"dali for everything; {to_get}"
    return f"pil for everything, slower{asked_for}; {to_get}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; 1 where something that training needs is missing."""
    Parser(prog="python -m pipeline.doctor", description=ABOUT).parse_args(argv)
    python = platform.python_version()
    supported = (3, 10) <= sys.version_info[:2] <= (3, 13)
    fix = "" if supported else "make setup PYTHON=python3.12 VENV=.venv312"
    findings = {"python": Finding("python", python, fix, fatal=not supported)}
    findings |= {module: check_package(module) for module in _PACKAGES}
    findings["libturbojpeg"] = check_turbojpeg()
    findings["device"] = check_device()
    for finding in findings.values():
        mark = "-" if finding.fix else "+"
        cure = f"   -> {finding.fix}" if finding.fix else ""
        print(f" {mark} {finding.name:<12} {finding.state}{cure}")
    fatal = any(finding.fatal for finding in findings.values())
    print(f"loader: {'none, training cannot start' if fatal else loader_line(findings)}")
    return 1 if fatal else 0


if __name__ == "__main__":
    sys.exit(main())
