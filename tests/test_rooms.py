"""The house: which room may import which, how large a room may be, and what a wheel installs."""

import ast
import functools
import gc
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

# A room may import rooms of a lower floor, and its own. pipeline and model share a floor, and do
# not import each other.
FLOORS = {"": 0, "pipeline": 1, "model": 1, "training": 2, "evaluation": 3, "train": 4}
FLOORS["benchmarks"] = 5
ROOMS = ("pipeline", "model", "training", "evaluation", "benchmarks")
LARGEST = 12  # files in a folder, without __init__.py
SHARED = [path for path in (ROOT / "ibeton").glob("*.py") if path.name != "train.py"]


def sources() -> dict[str, Path]:
    """Every module of the package by its name below `ibeton`; "" is the package itself."""
    found = {path.stem: path for path in SHARED} | {"train": ROOT / "train.py"}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return {name.removesuffix("__init__").rstrip("."): path for name, path in found.items()}


@functools.cache
def parsed(path: Path) -> ast.Module:
    """Its syntax tree. While CPython 3.11 makes one, no other may be made, not even by what the
    garbage collector or another thread runs meanwhile (github.com/python/cpython/issues/106905):
    the collector is the only one that would let them run."""
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        gc.enable()


def imported(path: Path, modules: dict[str, Path], lazy: bool = True) -> set[str]:
    """Modules of the package that the file at `path` imports; `lazy` counts those in functions."""
    tree = parsed(path)
    nodes = list(ast.walk(tree)) if lazy else tree.body
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [
                name if name.removeprefix("ibeton.") in modules else node.module for name in below
            ]
        else:
            continue
        found |= {
            name.removeprefix("ibeton").lstrip(".")
            for name in names
            if name.split(".")[0] == "ibeton"
        }
    return found


def room_of(name: str) -> str:
    first = name.split(".")[0]
    return first if first in FLOORS else ""


def test_no_import_goes_up() -> None:
    modules = sources()
    for name, path in modules.items():
        if name in ("", "__main__"):  # the doors to all rooms
            continue
        for other in imported(path, modules):
            room, target = room_of(name), room_of(other)
            allowed = room == target or FLOORS[target] < FLOORS[room]
            assert allowed, f"{path.relative_to(ROOT)} imports ibeton.{other}"


def test_no_import_goes_round() -> None:
    modules = sources()
    needs = {
        name: imported(path, modules, lazy=False) & set(modules) for name, path in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in needs[name]:
                if other != name:
                    visit(other, (*above, name))
            done.add(name)

    for name in modules:
        visit(name, ())


def test_no_module_is_imported_without_the_package_name() -> None:
    ours = set(ROOMS) | {"train", *(path.stem for path in SHARED if path.stem[0] != "_")}
    for path in sources().values():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                assert node.module.split(".")[0] not in ours, f"{path}: from {node.module}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    assert alias.name.split(".")[0] not in ours, f"{path}: import {alias.name}"


def test_a_room_holds_at_most_a_dozen_files() -> None:
    for room in ROOMS:
        for folder in (ROOT / room, *(d for d in (ROOT / room).rglob("*") if d.is_dir())):
            files = [f.name for f in folder.glob("*.py") if f.name != "__init__.py"]
            assert len(files) <= LARGEST, f"{folder.relative_to(ROOT)}: {sorted(files)}"


def test_no_loader_is_named_outside_the_pipeline() -> None:
    """What others need to know of a loader, advice and help included, is in its table. Lists of
    packages may hold `ffcv`, which is one too."""
    from ibeton.pipeline.loaders import LOADERS

    one = f"({'|'.join(LOADERS)})"
    said = re.compile(rf"--loader[= ]{one}\b|\b{one}[ -]loader|pipeline\.loaders\.{one}\b")
    for module, path in sources().items():
        if room_of(module) == "pipeline":
            continue
        text, constants = path.read_text(), set()
        assert not (found := said.search(text)), f"{path}: {found}"
        tree = parsed(path)
        packages: set[ast.AST] = set()
        for node in ast.walk(tree):
            entries = getattr(node, "args", None) or getattr(node, "elts", None) or []
            if isinstance(entries, list):
                values = {entry.value for entry in entries if isinstance(entry, ast.Constant)}
                packages |= set(entries) if values & {"numba", "numpy"} else set()
            if isinstance(node, ast.Constant):
                constants.add(node)
        named = {node.value for node in constants - packages} & set(LOADERS)
        assert not named, f"{path} names {named}"


@pytest.mark.slow
def test_a_wheel_installs_ibeton_alone_and_foreign_packages_do_not_disturb_it(
    tmp_path: Path,
) -> None:
    """Installed from a wheel, beside a package `model` and in a folder with a file `model.py`, the
    command converts photos, trains two steps and evaluates; `import ibeton` reads the result."""
    import numpy as np
    from PIL import Image

    source = tmp_path / "source"
    source.mkdir()
    for name in (*ROOMS, "ibeton", "train.py", "setup.py", "pyproject.toml"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"ibeton"}

    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "model").mkdir()
    (site / "model" / "__init__.py").write_text("raise RuntimeError('a stranger')\n")
    work = tmp_path / "work"
    work.mkdir()
    for name in ("model", "pipeline", "train", "options", "training"):
        (work / f"{name}.py").write_text("raise RuntimeError('a stranger')\n")
    rng = np.random.default_rng(0)
    for i in range(8):
        folder = work / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")

    def run(*command: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run(
            [sys.executable, *command], cwd=work, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert str(site) in run("-c", "import ibeton; print(ibeton.__file__)")
    assert "convert" in run("-m", "ibeton", "--help")
    run("-m", "ibeton", "convert", "photos", "photos.beton")
    small = (
        "--arch vit_t --embed-dim 24 --depth 1 --num-heads 2 --patch-size 8 --local-crops-size 16"
    )
    small += (
        " --global-crops-size 32 --local-crops-number 1 --out-dim 16 --hidden-dim 16 --epochs 1"
    )
    small += " --bottleneck-dim 8 --batch-size 4 --warmup-epochs 0 --warmup-teacher-temp-epochs 0"
    run("-m", "ibeton", "train", *small.split(), "--data", "photos.beton", "--device", "cpu")
    code = "import ibeton; print(ibeton.load_backbone('runs/vit_t/checkpoint.pt')[1]['depth'])"
    assert run("-c", code).split() == ["1"]
