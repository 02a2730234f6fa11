"""Parameter groups."""

from typing import Any

from torch import nn


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters of `module` into those with weight decay and those without.

    Biases and other vectors (norm scales) are not decayed, as in MAE and DINO. Each group has `decayed: bool`, by which
    a weight-decay schedule knows it.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or name.endswith(".bias") else decayed).append(parameter)
    return [{"params": decayed, "decayed": True}, {"params": plain, "decayed": False, "weight_decay": 0.0}]
