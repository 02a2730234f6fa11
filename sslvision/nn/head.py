"""Projection heads."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Prototypes(nn.Module):
    """A linear layer without bias whose rows are weight-normalised: g v / |v| (Salimans and Kingma 2016).

    Args:
        width: channels of the input.
        count: K, prototypes.
        unit: keep every norm g at 1, untrained, which steadies training (DINO, appendix D).
    """

    def __init__(self, width: int, count: int, *, unit: bool = True):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not unit)
        self.weight_v = nn.Parameter(torch.empty(count, width).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, K) of (B, width)."""
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class DINOHead(nn.Module):
    """Three-layer perceptron, an L2-normalised bottleneck, and prototypes (DINO, section 3.1 and appendix C).

    Parameters carry the names of the released checkpoints.

    Args:
        width: of the backbone's features.
        prototypes: K.
        hidden: width of the two hidden layers.
        bottleneck: width of the normalised layer.
        batch_norm: normalise the hidden layers over the batch.
        unit_prototypes: see Prototypes.
    """

    def __init__(
        self,
        width: int,
        prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        batch_norm: bool = False,
        unit_prototypes: bool = True,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((width, hidden), (hidden, hidden)):
            layers += [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if batch_norm else []), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.last_layer = Prototypes(bottleneck, prototypes, unit=unit_prototypes)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of features (B, width)."""
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))

    @staticmethod
    def settings_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Read the sizes of a head off its weights."""
        prototypes, bottleneck = state["last_layer.weight_v"].shape
        return {
            "prototypes": prototypes,
            "bottleneck": bottleneck,
            "hidden": state["mlp.0.weight"].shape[0],
            "batch_norm": "mlp.1.weight" in state,
        }
