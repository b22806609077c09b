"""Builds of PyTorch without CUDA come without Triton."""

import subprocess
import sys

from paths import ROOT

SCRIPT = """
import sys

sys.modules["triton"] = None  # importing it fails
import torch

from ibeton.model import ModelConfig, build
from ibeton.model.kernels.launch import kernels_run_on

size = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}
ibot = build(ModelConfig(**size, out_dim=64, local_crops_number=0))
assert not kernels_run_on(torch.zeros(1))
terms, _ = ibot(torch.randn(2, 2, 3, 32, 32), None, torch.ones(2, 2, 4, 4, dtype=torch.bool), 0)
terms["loss"].backward()
assert all(p.grad is not None for p in ibot.student.parameters())
"""


def test_a_step_runs_without_triton():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
