"""What --precision means on a device."""

import torch

# What autocast computes in; None: no autocast.
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision_on(device: torch.device, name: str) -> str:
    """fp16, bf16 or fp32: the precision `name` (one of `config.PRECISIONS`) on `device`.

    Raises ValueError for fp16 on a CPU.
    """
    if name == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU; on a CPU use fp32 or bf16")
    if name not in ("auto", "fast"):
        return name
    if device.type == "cuda":
        return "fp16"
    return "bf16" if name == "fast" and cpu_multiplies_bf16() else "fp32"


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has instructions for bf16 products (x86: AVX512-BF16, which every CPU with
    AMX has too). PyTorch emulates them elsewhere, which is slower than fp32."""
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return known is not None and bool(known())
