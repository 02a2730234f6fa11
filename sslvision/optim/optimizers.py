"""timm's optimizers by name."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from torch import nn
from torch.optim import Optimizer

from sslvision.errors import UsageError

SET_ELSEWHERE = {"params", "lr", "weight_decay"}


def has_option(name: str, option: str) -> bool:
    """Return whether one of timm's optimizers has an option of this name."""
    return (
        name in list_optimizers()
        and option in inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters
    )


def check_optimizer(name: str, options: Mapping[str, Any]) -> None:
    """Raise UsageError if an optimizer or its options cannot be. See `build_optimizer`."""
    if name != "adamw" or options:
        build_optimizer(name, [{"params": [nn.Parameter(torch.zeros(2, 2))]}], lr=0.0, options=options)


def build_optimizer(name: str, groups: list[dict[str, Any]], *, lr: float, options: Mapping[str, Any]) -> Optimizer:
    """Build one of timm's optimizers.

    Args:
        name: One of timm.optim.list_optimizers().
        groups: Parameter groups, each with its `weight_decay`; their other keys are kept.
        lr: Learning rate.
        options: Arguments of the optimizer, such as momentum or betas.

    Raises:
        UsageError: The optimizer or an option does not exist, a value is invalid, or a library it needs is not installed.
    """
    if name not in list_optimizers():
        near = difflib.get_close_matches(name, list_optimizers(), n=3, cutoff=0.5)
        raise UsageError(f"optimizer={name} is not one of timm's. Near it: {', '.join(near) or 'adamw, sgd, lamb'}.")
    if get_optimizer_info(name).second_order:
        raise UsageError(f"optimizer={name} needs second derivatives, which training here does not take: try adamw.")
    try:
        known = set(inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters) - SET_ELSEWHERE
        if unknown := sorted(options.keys() - known):
            raise UsageError(
                f"optimizer_options: {name} has no option {', '.join(unknown)}. It has {', '.join(sorted(known))}."
            )
        fused = {"fused": True} if name in ("adam", "adamw") else {}  # one kernel for a group
        return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=0.0, **{**fused, **options})
    except UsageError:
        raise
    except (TypeError, ValueError, AssertionError, ImportError, RuntimeError) as error:
        raise UsageError(f"optimizer={name} with optimizer_options={dict(options)} is invalid: {error}") from error
