"""The projection head of DINO."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

FEW = 64  # rows of features below which autocast does not pay on a CPU, as measured; see DINOHead.forward


class Prototypes(nn.Module):
    """A linear layer without bias whose rows are weight-normalized: g v / |v| (Salimans and Kingma 2016).

    Args:
        width: Channels of the input.
        count: K, number of prototypes.
        unit: Keep every norm g at 1, untrained, which stabilizes training (DINO, appendix D).
    """

    def __init__(self, width: int, count: int, *, unit: bool = True):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not unit)
        self.weight_v = nn.Parameter(torch.empty(count, width).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of x (B, width)."""
        product: Tensor = NormalizedRows.apply(x, self.weight_v, self.weight_g)
        return product


class NormalizedRows(torch.autograd.Function):
    """x (B, D), v (K, D), g (K, 1) -> x @ (g v / |v|).T, (B, K), without building the normalized K x D matrix.

    Each product with a row is scaled by g / |v|, and the gradient of v is one product and one in-place sum, where autograd
    would pass over several matrices of its size: with K = 65,536 that costs more than the product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, g: Tensor) -> Tensor:
        """Multiply in the dtype of autocast, if enabled; scale in the dtype of the weights."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x, low = x.to(dtype), v.to(dtype)
        norm = v.norm(dim=1)  # (K,)
        product = x @ low.T  # (B, K)
        ctx.save_for_backward(x, low, v, g, norm, product)
        return product * (g[:, 0] / norm)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With s = g / |v|, output gradient d and gradient dg of g: dv = s (d.T @ x) - v g dg / |v|^2."""
        x, low, v, g, norm, product = ctx.saved_tensors
        of_g = (gradient * product).sum(dim=0) / norm  # (K,)
        scaled = (gradient * (g[:, 0] / norm)).to(x.dtype)  # (B, K)
        of_v = (scaled.T @ x).to(v.dtype).addcmul_(v, (g[:, 0] * of_g / norm.square())[:, None], value=-1)
        return scaled @ low, of_v, of_g[:, None]


class DINOHead(nn.Module):
    """Three-layer perceptron, an L2-normalized bottleneck, and prototypes (DINO, section 3.1 and appendix C).

    Parameters carry the names of the released checkpoints.

    Args:
        width: Width of the backbone's features.
        prototypes: K, number of prototypes.
        hidden: Width of the two hidden layers.
        bottleneck: Width of the L2-normalized layer.
        batch_norm: Apply batch norm in the hidden layers.
        norm_last_layer: Keep the norms of the prototypes at 1. See Prototypes.
    """

    gathered_in_fp32 = True  # in bf16, norms of prototypes would be coarse

    def __init__(
        self,
        width: int,
        prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((width, hidden), (hidden, hidden)):
            layers += [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if batch_norm else []), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.last_layer = Prototypes(bottleneck, prototypes, unit=norm_last_layer)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of features (B, width).

        With few rows autocast is off: casting the weights would take longer than the products in fp32.
        """
        kind = x.device.type
        with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind) and len(x) >= FEW):
            if len(x) < FEW:
                x = x.to(self.last_layer.weight_v.dtype)
            return self.last_layer(F.normalize(self.mlp(x), dim=-1))

    @staticmethod
    def settings_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of a head with these weights."""
        prototypes, bottleneck = state["last_layer.weight_v"].shape
        return {
            "prototypes": prototypes,
            "bottleneck": bottleneck,
            "hidden": state["mlp.0.weight"].shape[0],
            "batch_norm": "mlp.1.weight" in state,
        }
