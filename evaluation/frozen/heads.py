"""Linear layers on frozen features, one for each learning rate, trained together.

SGD with momentum and no weight decay; each rate falls on a cosine to 0, epoch by epoch. A step is
two products of matrices, logits = W X^T and gradient = (softmax - target) X, whose rows are all
layers' classes: no layer is touched alone, and none depends on which others there are.

In shapes: H layers, b photos, K classes, C features.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATES = tuple(n * 10.0**p for p in range(-4, 1) for n in range(1, 10))  # for a batch of 256
MOMENTUM = 0.9
INIT_STD = 0.01

Batches = Iterator[tuple[Tensor, Tensor]]  # features float32 [b, C], labels int64 [b]


@dataclass(frozen=True)
class LinearSettings:
    """Optimization of the layers. Raises ValueError, naming the option, for values that cannot
    work."""

    epochs: int = 100
    batch_size: int = 1024
    rates: tuple[float, ...] = RATES  # learning rates for a batch of 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError("--epochs and --sgd-batch must be at least 1")
        if not self.rates or min(self.rates) <= 0:
            raise ValueError("--lr must be above 0")


@dataclass(frozen=True)
class LinearHeads:
    """H linear layers that see the same features. Classes come first: a softmax over them is then
    one pass over whole rows."""

    weight: Tensor  # [K, H, C]
    bias: Tensor  # [K, H]

    def logits(self, features: Tensor) -> Tensor:
        """Features [b, C] -> [K, H, b]."""
        rows = torch.addmm(self.bias.reshape(-1, 1), self.weight.flatten(0, 1), features.T)
        return rows.view(*self.bias.shape, len(features))


def first_weight(classes: int, width: int, seed: int) -> Tensor:
    """Weights [K, C] that every layer starts from; biases start at 0."""
    return INIT_STD * torch.randn(classes, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def train_heads(
    batches: Callable[[int], Batches],  # of an epoch
    val: Tensor,  # features [m, C]
    val_labels: Tensor,  # int64 [m]
    num_classes: int,
    settings: LinearSettings,
    device: torch.device | str = "cpu",
) -> tuple[LinearHeads, np.ndarray]:
    """The layers after the last epoch, and top-1 in percent, float [epochs, H], after each."""
    start = first_weight(num_classes, val.shape[1], settings.seed).to(device).unsqueeze(1)
    rates = torch.tensor(settings.rates, device=device) * settings.batch_size / 256  # [H]
    weight = start.repeat(1, len(rates), 1)
    heads = LinearHeads(weight, weight.new_zeros(weight.shape[:2]))
    momentum = LinearHeads(torch.zeros_like(heads.weight), torch.zeros_like(heads.bias))
    accuracies = np.empty((settings.epochs, len(rates)))
    for epoch in range(settings.epochs):
        now = rates * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2
        for features, labels in batches(epoch):
            features, labels = features.to(device), labels.to(device)
            error = heads.logits(features).softmax(0)  # the loss's gradient by logits, times b
            own = labels.expand(1, len(rates), -1)
            error.scatter_add_(0, own, error.new_full((), -1).expand_as(own))
            gradient = (error.flatten(0, 1) @ features).view_as(weight), error.sum(2)
            _move(heads.weight, momentum.weight, gradient[0] / len(labels), now.unsqueeze(1))
            _move(heads.bias, momentum.bias, gradient[1] / len(labels), now)
        accuracies[epoch] = accuracy(heads, val, val_labels)
    return heads, accuracies


def _move(parameter: Tensor, momentum: Tensor, gradient: Tensor, rates: Tensor) -> None:
    """One step of momentum SGD, in place, with a rate for each layer."""
    momentum.mul_(MOMENTUM).add_(gradient)
    parameter.addcmul_(momentum, rates, value=-1)


@torch.no_grad()
def accuracy(heads: LinearHeads, features: Tensor, labels: Tensor, chunk: int = 1024) -> np.ndarray:
    """Top-1 of each layer in percent, float [H]."""
    device = heads.weight.device
    right = torch.zeros(heads.bias.shape[1], device=device)
    for part, own in zip(features.split(chunk), labels.split(chunk), strict=True):
        # max: argmax over the first dimension is six times as slow on a CPU
        right += (heads.logits(part.to(device)).max(0).indices == own.to(device)).sum(1)
    return 100 * right.cpu().numpy() / len(labels)


def train_head_reference(
    batches: Callable[[int], Batches],
    val: Tensor,
    val_labels: Tensor,
    num_classes: int,
    settings: LinearSettings,
    device: torch.device | str = "cpu",
) -> tuple[nn.Linear, np.ndarray]:
    """Reference for `train_heads`: the layer of the first rate alone, by PyTorch's own
    parts, and its accuracies [epochs]."""
    layer = nn.Linear(val.shape[1], num_classes)
    nn.init.zeros_(layer.bias)
    layer.weight.data = first_weight(num_classes, val.shape[1], settings.seed)
    layer, val, val_labels = layer.to(device), val.to(device), val_labels.to(device)
    lr = settings.rates[0] * settings.batch_size / 256
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs, eta_min=0)
    accuracies = np.empty(settings.epochs)
    for epoch in range(settings.epochs):
        for features, labels in batches(epoch):
            optimizer.zero_grad()
            F.cross_entropy(layer(features.to(device)), labels.to(device)).backward()
            optimizer.step()
        cosine.step()
        with torch.no_grad():
            accuracies[epoch] = 100 * float((layer(val).argmax(1) == val_labels).double().mean())
    return layer, accuracies
