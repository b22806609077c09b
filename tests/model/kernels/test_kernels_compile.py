"""Every Triton kernel of a training step compiles for the GPUs that it is meant for, and its
registers suffice. No GPU is needed: the launches are recorded, and the assembler comes with Triton.
"""

from dataclasses import replace

import pytest
import torch

from ibeton.benchmarks.harness.budget_launches import Settings, record_step
from ibeton.benchmarks.harness.compiled_kernels import compile_launch, distinct
from ibeton.model import ModelConfig

pytest.importorskip("triton")
# Blocks are alike, so two are enough: the first, and the last, whose MLP takes chosen tokens.
NAMES = {
    *("_residual_norm_kernel", "_residual_norm_backward_kernel", "_column_sums_kernel"),
    *("_embed_kernel", "_embed_backward_kernel", "_unit_rows_kernel", "_unit_rows_backward_kernel"),
    *("_weight_norm_kernel", "_weight_norm_backward_kernel", "_row_kernel", "_scale_rows_kernel"),
    *("_class_metrics_kernel", "_squares_kernel", "_norms_kernel", "_decide_kernel"),
    *("_update_kernel", "_bias_gelu_kernel", "_bias_gelu_backward_kernel"),
}
WITH_MATRIX_UNITS = NAMES | {"_attention_kernel", "_attention_backward_kernel"}
WITHOUT = NAMES | {"_pack_gradients_kernel"}


@pytest.mark.parametrize(
    ("arch", "dtype", "capability"),
    [
        ("vit_s", torch.float16, 70),
        *(
            pytest.param(arch, dtype, capability, marks=pytest.mark.slow)
            for arch in ("vit_s", "vit_b", "vit_l")
            for dtype, capability in (
                *((torch.float16, 70), (torch.float16, 80), (torch.float16, 90)),
                *((torch.bfloat16, 80), (torch.bfloat16, 90), (None, 70), (None, 90)),
            )
        ),
    ],
)
def test_kernels_compile_without_spills(tmp_path, monkeypatch, arch, dtype, capability):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = ModelConfig(arch=arch, depth=2, layer_scale=0.1 if arch == "vit_l" else 0.0)
    settings = Settings(config, 4, dtype=dtype, capability=capability)
    recomputing = settings._replace(model=replace(config, recompute="on"))
    kernels = record_step(settings).kernels + record_step(recomputing).kernels
    launches = distinct(kernels)
    names = WITH_MATRIX_UNITS if capability >= 80 and dtype is not None else WITHOUT
    assert {launch.name for launch in launches} == names
    for launch in launches:
        resources = compile_launch(launch, capability)
        assert resources.spills == 0, resources
        assert 0 < resources.registers * 32 * resources.warps <= 65_536, resources


@pytest.mark.parametrize("capability", [70, 90])
@pytest.mark.parametrize("prototypes", [65_536, 31])
def test_the_loss_compiles_for_other_numbers_of_prototypes(
    tmp_path, monkeypatch, prototypes, capability
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = ModelConfig(depth=1, out_dim=prototypes)
    for launch in distinct(record_step(Settings(config, 2)).kernels):
        if launch.name in ("_row_kernel", "_class_metrics_kernel"):
            assert compile_launch(launch, capability).spills == 0
