"""The projection head: an MLP to a bottleneck on the unit sphere, then prototypes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibeton.model.backbones.blocks import init_linear
from ibeton.model.config import ModelConfig
from ibeton.model.fused.head import (
    bottleneck_and_mean,
    fused_bottleneck,
    fused_prototypes,
    target_logits,
)
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
        norms = {"ln": nn.LayerNorm, "bn": nn.BatchNorm1d}
        norm = None if config.norm_in_head == "none" else norms[config.norm_in_head](hidden)
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
        """Tokens [..., C] -> unit vectors [..., bottleneck_dim], in float32 at least, or by the
        kernels in the dtype of matrix products."""
        # One list of tokens, as the statistics of a batch norm are over images and tokens.
        rows = x.flatten(0, -2)
        if self._can_fuse(rows):
            return fused_bottleneck(rows, self._layers()).unflatten(0, x.shape[:-1])
        x = self.mlp(rows).unflatten(0, x.shape[:-1])
        # In fp16 the squares would overflow.
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)

    def bottleneck_and_mean(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`bottleneck` of tokens [B, 1 + N, C], class token first, and the mean of its unit vectors
        over all patches, [bottleneck_dim]. Without gradient."""
        with torch.no_grad():
            rows = x.flatten(0, -2)
            if self._can_fuse(rows):
                units, mean = bottleneck_and_mean(rows, self._layers(), x.shape[1])
                return units.unflatten(0, x.shape[:-1]), mean
            units = self.bottleneck(x)
            return units, units[:, 1:].mean(dim=(0, 1))

    def _can_fuse(self, x: Tensor) -> bool:
        """Whether linear layers and GELUs alternate, on a device that runs the Triton kernels."""
        kinds = (nn.Linear, nn.GELU)
        return kernels_run_on(x) and all(type(m) is kinds[i % 2] for i, m in enumerate(self.mlp))

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer.weight, layer.bias) for layer in self.mlp if isinstance(layer, nn.Linear)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, 1 + N, C], class token first -> class [B, K] and patch logits [B, N, K2]."""
        x = self.bottleneck(x)
        return self.prototypes(x[:, 0], x[:, 1:])

    def prototypes(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of class tokens [R, bottleneck_dim] and of patches [..., bottleneck_dim] ->
        their logits."""
        last, last2 = self.last_layer, self.last_layer2
        if kernels_run_on(cls):
            rows = patches.flatten(0, -2)
            if last is last2:
                logits, patch_logits = fused_prototypes([cls, rows], last.weight_v, last.weight_g)
            else:
                (logits,) = fused_prototypes([cls], last.weight_v, last.weight_g)
                (patch_logits,) = fused_prototypes([rows], last2.weight_v, last2.weight_g)
            return logits, patch_logits.unflatten(0, patches.shape[:-1])
        weight = last.weight()
        patch_weight = weight if last is last2 else last2.weight()
        return F.linear(cls, weight), F.linear(patches, patch_weight)

    def target_logits(self, cls: Tensor, patches: Tensor, mean: Tensor) -> tuple[Tensor, ...]:
        """`prototypes` of class tokens and patches, both [R, bottleneck_dim], and the patch logits
        of a mean of unit vectors, float32 at least. Without gradient."""
        last, last2 = self.last_layer, self.last_layer2
        if last is last2 and kernels_run_on(cls):
            return target_logits(cls, patches, mean, last.weight_v, last.weight_g)
        with torch.autocast(cls.device.type, enabled=False):
            mean_logits = last2(mean)
        return *self.prototypes(cls, patches), mean_logits

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
