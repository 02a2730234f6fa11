"""Optimizers by name: timm's, and our Muon."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from torch import nn
from torch.optim import Optimizer

from sslvision.errors import UsageError
from sslvision.optim.muon import Muon, split_matrices

SET_ELSEWHERE = {"params", "lr", "weight_decay"}


def has_option(name: str, option: str) -> bool:
    """Return whether there is an optimizer of this name with an option of this name."""
    return name in list_optimizers() and option in options_of(name)


def options_of(name: str) -> set[str]:
    """Return the names of an optimizer's options."""
    build = Muon if name == "muon" else get_optimizer_class(name, bind_defaults=False)
    return set(inspect.signature(build).parameters) - SET_ELSEWHERE


def check_optimizer(name: str, options: Mapping[str, Any]) -> None:
    """Raise UsageError if an optimizer or its options cannot be. See `build_optimizer`."""
    if name != "adamw" or options:
        build_optimizer(name, [{"params": [nn.Parameter(torch.zeros(2, 2))]}], lr=0.0, options=options)


def build_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    *,
    lr: float,
    options: Mapping[str, Any],
    module: nn.Module | None = None,
) -> Optimizer:
    """Build one of timm's optimizers, or for "muon" our own (muon.py), which takes AdamW's learning rates.

    Args:
        name: One of timm.optim.list_optimizers().
        groups: Parameter groups, each with its `weight_decay`; their other keys are kept.
        lr: Learning rate.
        options: Arguments of the optimizer, such as momentum or betas.
        module: The module with these parameters, whose linear layers Muon updates; without it AdamW updates them all.

    Raises:
        UsageError: The optimizer or an option does not exist, a value is invalid, or a library it needs is not installed.
    """
    if name not in list_optimizers():
        near = difflib.get_close_matches(name, list_optimizers(), n=3, cutoff=0.5)
        raise UsageError(f"optimizer={name} is not one of timm's. Near it: {', '.join(near) or 'adamw, sgd, lamb'}.")
    if get_optimizer_info(name).second_order:
        raise UsageError(f"optimizer={name} needs second derivatives, which training here does not take: try adamw.")
    try:
        known = options_of(name)
        if unknown := sorted(options.keys() - known):
            raise UsageError(
                f"optimizer_options: {name} has no option {', '.join(unknown)}. It has {', '.join(sorted(known))}."
            )
        if name == "muon":
            return Muon(groups if module is None else split_matrices(groups, module), lr=lr, **options)
        fused = {"fused": True} if name in ("adam", "adamw") else {}  # one kernel for a group
        return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=0.0, **{**fused, **options})
    except UsageError:
        raise
    except (TypeError, ValueError, AssertionError, ImportError, RuntimeError) as error:
        raise UsageError(f"optimizer={name} with optimizer_options={dict(options)} is invalid: {error}") from error
