"""The projection head: an MLP to a bottleneck on the unit sphere, then prototypes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibeton.model.backbones.blocks import init_linear
from ibeton.model.config import ModelConfig
from ibeton.model.kernels.bias_gelu import bias_gelu
from ibeton.model.kernels.half_weights import half_linear
from ibeton.model.kernels.launch import kernels_run_on


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are g * v / |v|: [..., in_dim] -> [..., out_dim].

    The parameters are `weight_g` [out_dim, 1] and `weight_v` [out_dim, in_dim], the names that
    `torch.nn.utils.weight_norm` uses. v starts uniform, as in `nn.Linear`, and g at 1.
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

    A shared head has one last layer for class token and patches: `last_layer2` is then the same
    module as `last_layer`, and the state dict lists it twice. `config.norm_last_layer` freezes g.
    With `config.norm_in_head` "ln" or "bn" one norm object follows every hidden layer, as
    published: one set of weights, and batch statistics that each use updates.
    """

    def __init__(self, config: ModelConfig, is_student: bool) -> None:
        super().__init__()
        hidden, layers = config.hidden_dim, config.head_layers
        widths = [config.width()] + [hidden] * (layers - 1) + [config.bottleneck_dim]
        norm = _hidden_norm(config.norm_in_head, hidden)
        activation = nn.GELU() if config.act == "gelu" else nn.ReLU()
        parts: list[nn.Module] = []
        for i in range(layers):
            parts.append(nn.Linear(widths[i], widths[i + 1]))
            if i < layers - 1:
                parts += [activation] if norm is None else [norm, activation]
        self.mlp = nn.Sequential(*parts)
        self.mlp.apply(init_linear)
        self.last_layer = WeightNormLinear(config.bottleneck_dim, config.out_dim)
        shared = config.shared_head if is_student else config.shared_head_teacher
        self.last_layer2 = (
            self.last_layer
            if shared
            else WeightNormLinear(config.bottleneck_dim, config.patch_prototypes())
        )
        if config.norm_last_layer:
            self.last_layer.weight_g.requires_grad_(False)
            self.last_layer2.weight_g.requires_grad_(False)

    def bottleneck(self, x: Tensor) -> Tensor:
        """Tokens [..., C] -> unit vectors [..., bottleneck_dim], float32 at least."""
        # Batch norm wants one long list of tokens: its statistics run over images and tokens.
        rows = x.flatten(0, -2)
        rows = self._fused_mlp(rows) if self._can_fuse(rows) else self.mlp(rows)
        x = rows.unflatten(0, x.shape[:-1])
        # The squares leave the range of fp16.
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)

    def _can_fuse(self, x: Tensor) -> bool:
        """Whether linear layers and GELUs alternate, on a device that runs the Triton kernels."""
        kinds = (nn.Linear, nn.GELU)
        return kernels_run_on(x) and all(type(m) is kinds[i % 2] for i, m in enumerate(self.mlp))

    def _fused_mlp(self, x: Tensor) -> Tensor:
        """`mlp` with biases and GELUs in one pass each."""
        *hidden, last = (layer for layer in self.mlp if isinstance(layer, nn.Linear))
        for layer in hidden:
            x = bias_gelu(half_linear(x, layer.weight), layer.bias)
        return half_linear(x, last.weight, last.bias)

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
    return nn.LayerNorm(width) if name == "ln" else nn.BatchNorm1d(width)
