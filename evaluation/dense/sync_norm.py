"""Batch norm over the images of all processes, on GPUs by PyTorch, on CPUs by this file.

torch.nn.SyncBatchNorm refuses CPUs, so that without this a run would depend on the number of
processes there, and no test without a GPU could compare one process with two.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with the mean and variance of the batches of all ranks, [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims, shape = (0, 2, 3), (1, -1, 1, 1)
        count = torch.tensor(float(x.numel() // x.shape[1]))
        dist.all_reduce(count)
        mean = all_reduce(x.sum(dims)) / count
        centered = x - mean.view(shape)
        variance = all_reduce(centered.square().sum(dims)) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None  # a float: PyTorch's default
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centered * scale.view(shape) + self.bias.view(shape)


def synchronize(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with every batch norm replaced by one over all ranks; same state dict."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            new = CpuSyncBatchNorm(child.num_features, child.eps, child.momentum)
            new.load_state_dict(child.state_dict())
            setattr(module, name, new.train(child.training))
        else:
            synchronize(child, device)
    return module
