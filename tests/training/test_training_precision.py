"""What --precision means on each device."""

import pytest
import torch

from ibeton.training.precision import precision_on

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_precision_that_is_named_is_taken() -> None:
    assert [precision_on(CPU, name) for name in ("bf16", "fp32")] == ["bf16", "fp32"]
    assert [precision_on(GPU, name) for name in ("fp16", "bf16")] == ["fp16", "bf16"]
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        precision_on(CPU, "fp16")


def test_auto_is_exact_on_a_cpu() -> None:
    assert (precision_on(CPU, "auto"), precision_on(GPU, "auto")) == ("fp32", "fp16")


@pytest.mark.parametrize(("can", "expected"), [(True, "bf16"), (False, "fp32"), (None, "fp32")])
def test_fast_follows_the_instructions_of_the_cpu(
    can: bool | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None: a PyTorch that cannot tell
    name = "_is_avx512_bf16_supported"
    if can is None:
        monkeypatch.delattr(torch.cpu, name, raising=False)
    else:
        monkeypatch.setattr(torch.cpu, name, lambda: can, raising=False)
    assert precision_on(CPU, "fast") == expected
    assert precision_on(GPU, "fast") == "fp16"
