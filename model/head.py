"""The projection head: an MLP to a bottleneck on the unit sphere, then prototypes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibeton.model.backbones.blocks import init_linear


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are g * v / |v|: [..., in_dim] -> [..., out_dim].

    Parameters `weight_g` [out_dim, 1] and `weight_v` [out_dim, in_dim] are named as
    `torch.nn.utils.weight_norm` does. Rows start uniform, as those of a plain linear layer, g at 1.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.uniform_(self.weight_v, -(in_dim**-0.5), in_dim**-0.5)

    def weight(self) -> Tensor:
        """The effective matrix [out_dim, in_dim]."""
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight())


class IBOTHead(nn.Module):
    """Tokens -> logits over prototypes (iBOT, section 3.2, and published code).

    `shared` uses one last layer for class token and patches: `last_layer2` is then the same module
    as `last_layer` (both stand in the state dict), and `patch_out_dim` is not used.
    `norm_last_layer` freezes g. With `norm_in_head` 'ln' or 'bn' the same norm object follows every
    hidden layer, as published: one set of weights, and batch statistics updated by each use.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        patch_out_dim: int,
        shared: bool = True,
        norm_last_layer: bool = False,
        norm_in_head: str = "none",
        act: str = "gelu",
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        layers: int = 3,
    ) -> None:
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (layers - 1) + [bottleneck_dim]
        norm = _hidden_norm(norm_in_head, hidden_dim)
        activation = _activation(act)
        parts: list[nn.Module] = []
        for i in range(layers):
            parts.append(nn.Linear(widths[i], widths[i + 1]))
            if i < layers - 1:
                parts += [activation] if norm is None else [norm, activation]
        self.mlp = nn.Sequential(*parts)
        self.mlp.apply(init_linear)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer2 = (
            self.last_layer if shared else WeightNormLinear(bottleneck_dim, patch_out_dim)
        )
        if norm_last_layer:
            self.last_layer.weight_g.requires_grad_(False)
            self.last_layer2.weight_g.requires_grad_(False)

    def bottleneck(self, x: Tensor) -> Tensor:
        """Tokens [..., C] -> unit vectors [..., bottleneck_dim], float32 at least."""
        # Batch norm wants one long list of tokens: its statistics run over images and tokens.
        x = self.mlp(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        # The squares leave the range of fp16.
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, 1 + N, C], class token first -> class [B, K] and patch logits [B, N, K2]."""
        x = self.bottleneck(x)
        return self.prototypes(x[:, 0], x[:, 1:])

    def prototypes(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of class tokens and of patches [..., bottleneck_dim] -> their logits."""
        weight = self.last_layer.weight()
        shared = self.last_layer2 is self.last_layer
        patch_weight = weight if shared else self.last_layer2.weight()
        return F.linear(cls, weight), F.linear(patches, patch_weight)

    def cls_logits(self, x: Tensor) -> Tensor:
        """Class tokens [B, C] -> logits [B, K]."""
        return self.last_layer(self.bottleneck(x))

    def couples_tokens(self) -> bool:
        """Whether a token's logits depend on the others', through batch statistics."""
        return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in self.mlp)

    def sync_batch_norm(self) -> None:
        """Take batch statistics over all ranks. The norm stays one object in its two places."""
        for i, layer in enumerate(self.mlp):
            if isinstance(layer, nn.BatchNorm1d):
                synced = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
                for j in range(i, len(self.mlp)):
                    if self.mlp[j] is layer:
                        self.mlp[j] = synced


def _hidden_norm(name: str, width: int) -> nn.Module | None:
    if name == "none":
        return None
    if name == "ln":
        return nn.LayerNorm(width)
    if name == "bn":
        return nn.BatchNorm1d(width)
    raise ValueError(f"norm in head {name}: expected none, ln or bn")


def _activation(name: str) -> nn.Module:
    if name == "gelu":
        return nn.GELU()
    if name == "relu":
        return nn.ReLU()
    raise ValueError(f"activation in head {name}: expected gelu or relu")
