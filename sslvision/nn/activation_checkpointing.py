"""Activation checkpointing: activations are recomputed in the backward pass (Chen et al. 2016, arXiv:1604.06174).

Only the input of a block is kept. The random state is restored for the recomputation, so losses and gradients do not change.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def run_checkpointed(function: Callable[..., Tensor], *inputs: Any, enabled: bool) -> Tensor:
    """Return `function(*inputs)`; if `enabled`, keep only the inputs for the backward pass."""
    if not enabled or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)


def count_batches_once(module: nn.Module) -> None:
    """Keep batch norms from updating their running statistics a second time when a batch is recomputed."""
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and norm.track_running_stats:
            norm.register_forward_pre_hook(_freeze_in_backward)
            norm.register_forward_hook(_restore_momentum, always_call=True)


def _freeze_in_backward(norm: Any, inputs: Any) -> None:
    if norm.training and torch._C._current_graph_task_id() != -1:  # inside a backward pass
        norm.momentum_in_forward, norm.momentum = norm.momentum, 0.0


def _restore_momentum(norm: Any, inputs: Any, output: Any) -> None:
    if hasattr(norm, "momentum_in_forward"):
        norm.momentum = norm.momentum_in_forward
        norm.num_batches_tracked.sub_(1)
        del norm.momentum_in_forward
