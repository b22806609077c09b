"""Fused computations, one file each. Beside each stands the plain PyTorch function, `*_reference`,
that defines it; `tests/model/kernels` compares the two and `benchmarks/kernels.py` times them."""
