"""Copies of weights in the precision of matrix products, made once per step for all networks, and
float32 gradients of weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ibeton.model.kernels.launch import counted, kernels_run_on

# parameter -> its copy, while a `HalfWeights.fresh` is open
_copies: dict[Tensor, Tensor] = {}


class HalfWeights:
    """Copies of the parameters of linear layers and convolutions. Their memory stays the same from
    step to step, as CUDA graphs need it. `model.fused.update` writes them with the parameters."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self._networks = list(networks)
        self._versions: list[int] = []
        self.copies: dict[Tensor, Tensor] = {}

    @contextmanager
    def fresh(self, x: Tensor) -> Iterator[None]:
        """Copies of the parameters as they are now, if Triton kernels take the input x and autocast
        is on. `in_dtype` finds the copies inside."""
        dtype = product_dtype(x)
        if kernels_run_on(x) and dtype is not x.dtype:
            self._make(dtype)
            _copies.update(self.copies)
        try:
            yield
        finally:
            for parameter in self.copies:
                _copies.pop(parameter, None)

    def _make(self, dtype: torch.dtype) -> None:
        parameters = [
            parameter
            for network in self._networks
            for layer in network.modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
            for parameter in layer.parameters(recurse=False)
        ]
        kept = {p: (p.device, dtype) for p in parameters}
        if kept != {p: (copy.device, copy.dtype) for p, copy in self.copies.items()}:
            self.copies = {p: torch.empty_like(p, dtype=dtype) for p in parameters}
            self._versions = []
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy all parameters in one call if PyTorch has changed one since, as by loading a
        checkpoint."""
        versions = [parameter._version for parameter in self.copies]
        if versions != self._versions:
            torch._foreach_copy_(list(self.copies.values()), list(self.copies))
            self._versions = versions


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: that of autocast, if it is on."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def in_dtype(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter in `dtype`, without gradient: the step's copy, or one made now."""
    copy = _copies.get(parameter)
    if copy is not None and copy.dtype is dtype:
        return copy
    return parameter.detach().to(dtype)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """grad.T @ x in the dtype of `weight`. On CUDA the product writes float32, so nothing is
    rounded or cast in between."""
    if grad.dtype is not weight.dtype and (grad.is_cuda or counted()):
        return torch.mm(grad.t(), x, out_dtype=weight.dtype)
    return (grad.t() @ x).to(weight.dtype)
