"""Parameter groups, and how a schedule applies to them.

Besides `params` and the optimizer's own keys a group may have `lr_scale`, `constant_lr` and `decayed`; `base.Method.optimizer`
documents them.
"""

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sslvision.errors import UsageError
from sslvision.nn.freezing import layers


def apply_schedule(groups: Sequence[dict[str, Any]], rates: dict[str, float]) -> None:
    """Write the "lr" and "weight_decay" of a schedule to the groups that follow it."""
    for group in groups:
        if not group.get("constant_lr", False):
            group["lr"] = rates["lr"] * group.get("lr_scale", 1.0)
        if group.get("decayed", True):
            group["weight_decay"] = rates["weight_decay"]


def check_groups(optimizer: Optimizer) -> None:
    """Raise UsageError if a group with a constant learning rate has none."""
    for number, group in enumerate(optimizer.param_groups):
        if group.get("constant_lr", False) and not group["lr"]:
            raise UsageError(
                f"Parameter group {number} of the optimizer has constant_lr=True and a learning rate of 0, so it would never "
                'train: give the group its own "lr".'
            )


def decay_groups(module: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Split the trainable parameters of `module` into those with weight decay and those without.

    Biases and other vectors (norm scales) are not decayed, as in MAE and DINO.

    Args:
        module: The module whose parameters train.
        options: Further keys of both groups, such as `lr=0.05, constant_lr=True`.

    Returns:
        Two groups, the decayed one first.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or name.endswith(".bias") else decayed).append(parameter)
    return [
        {"params": decayed, "decayed": True, **options},
        {"params": plain, "decayed": False, "weight_decay": 0.0, **options},
    ]


def layer_groups(model: Any, *, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters of a timm model by layer, and those of each layer as `decay_groups` does.

    Source: BEiT (Bao et al. 2021), as in MAE's fine-tuning.

    Args:
        model: A timm model with its head.
        weight_decay: Weight decay of matrices. Biases, other vectors, and what the model itself exempts (class tokens,
            position embeddings, attention biases) have none.
        layer_decay: A group's `lr_scale` is this to the power of the number of layers above it: 1 for the head, which the
            final norm belongs to, and smallest for the embedding. 1 gives one learning rate everywhere.

    Returns:
        Groups with `params`, `lr_scale`, `decayed` and `weight_decay`.

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
