"""Parameter groups."""

from fnmatch import fnmatch
from typing import Any

from torch import nn

from sslvision.errors import UsageError
from sslvision.nn.freezing import layers


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


def layer_groups(model: Any, *, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters of a timm model by layer, and each layer's as `decay_groups` does.

    Args:
        model: a timm model that has its head on.
        weight_decay: of matrices; biases, other vectors, and what the model itself exempts (class tokens, positions,
            biases of attention) have none.
        layer_decay: `lr_scale` of a group is this to the power of how many layers are above it: 1 for the head, which the
            final norm belongs to; least for the embedding. 1 for one learning rate everywhere.

    Returns:
        Groups with `params`, `lr_scale`, `decayed` and `weight_decay`. Source: BEiT (Bao et al. 2021), as in MAE's fine-tuning.

    Raises:
        UsageError: layer_decay is out of range, or timm does not know the model's layers.
    """
    if not 0 < layer_decay <= 1:
        raise UsageError(
            f"layer_decay={layer_decay:g} must be more than 0 and at most 1: 1 is the same rate everywhere."
        )
    from_the_top = reversed(layers(model)) if layer_decay < 1 else ()
    above = {name: number for number, names in enumerate(from_the_top) for name in names}
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        vector = parameter.ndim <= 1 or name.endswith(".bias")
        decayed = not vector and not any(fnmatch(name, pattern) for pattern in exempt)
        height = above.get(name, 0)
        group = {"params": [], "lr_scale": layer_decay**height, "decayed": decayed}
        group["weight_decay"] = weight_decay if decayed else 0.0
        groups.setdefault((height, decayed), group)["params"].append(parameter)
    return list(groups.values())
