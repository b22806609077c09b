"""The Triton kernels of a training step, compiled for GPUs that need not be present, with the
registers, shared memory and spills that the assembler reports."""

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibeton.model.kernels.launch import Launch

KINDS = {
    **{torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"},
    **{torch.int32: "i32", torch.int64: "i64", torch.float64: "fp64", torch.bool: "i1"},
}
OPTIONS = ("num_warps", "num_stages")
ALIGNED = 16  # bytes; Triton makes wide loads where addresses and sizes are multiples of it


class Resources(NamedTuple):
    """What a compiled kernel takes."""

    name: str
    capability: int
    warps: int
    registers: int  # per thread
    shared: int  # bytes per program
    spills: int  # bytes of a thread's registers in local memory


def distinct(launches: list[Launch]) -> list[Launch]:
    """One launch of each kernel that would be compiled."""
    seen: dict[tuple[str, str, str], Launch] = {}
    for launch in launches:
        key = (launch.name, str(_signature(launch)), str(launch.constants))
        seen.setdefault(key, launch)
    return list(seen.values())


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compile the kernel of a launch for sm_`capability`. Raises RuntimeError where PyTorch has no
    CUDA assembler."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {k: v for k, v in launch.constants.items() if k not in OPTIONS}
    options = {k: v for k, v in launch.constants.items() if k in OPTIONS}
    names = launch.kernel.arg_names
    named = dict(zip(names, launch.arguments, strict=False))
    constants |= {name: value for name, value in named.items() if value is None}
    aligned = {
        (names.index(name),): [["tt.divisibility", ALIGNED]]
        for name, value in named.items()
        if isinstance(value, Tensor) or (type(value) is int and value % ALIGNED == 0)
    }
    source = ASTSource(launch.kernel, _signature(launch), constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options=options)
    assert f".target sm_{capability}" in made.asm["ptx"]
    registers, spills = _usage(made.asm["cubin"])
    return Resources(
        launch.name, capability, options["num_warps"], registers, made.metadata.shared, spills
    )


def _signature(launch: Launch) -> dict[str, str]:
    """Argument -> type, in the kernel's order."""

    def kind(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"*{KINDS[value.dtype]}"
        if value is None:
            return "constexpr"
        return "i32" if isinstance(value, int) else "fp32"

    named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    signature = {name: kind(value) for name, value in named.items()}
    return signature | {n: "constexpr" for n in launch.kernel.arg_names if n not in named}


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        raise RuntimeError(f"{tool} is missing: install Triton as PyTorch for CUDA brings it")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [os.fspath(tool), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no usage: {text}")
    return int(found[1]), int(found[2]) + int(found[3])
