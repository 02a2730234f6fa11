"""Skipping updates whose gradients are not finite, without synchronizing with the device."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from sslvision.nn.shards import local_shards, norms_of
from sslvision.optim.muon import Muon


@torch.no_grad()
def skip_nonfinite(optimizer: Optimizer, gradients: list[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Make the next `optimizer.step()` do nothing if a gradient is not finite.

    Muon and fused Adam and AdamW read a flag on the device and leave weights and state unchanged. For other optimizers all
    gradients are set to zero: momentum and weight decay still act once, but weights stay finite.

    Args:
        optimizer: The optimizer, before its step.
        gradients: Gradients of all its parameters, averaged over processes, so that all processes decide alike. They may be in
            shards.

    Returns:
        The norm of all gradients, which is not finite if the update is skipped, and the norm of each: scalars on the device.
    """
    norms = norms_of(gradients)
    norm = torch.linalg.vector_norm(torch.stack([*norms]))
    broken = ~norm.isfinite()
    if optimizer.defaults.get("fused") or isinstance(optimizer, Muon):
        optimizer.found_inf = broken.float()  # type: ignore[attr-defined]  # what torch.amp.GradScaler sets
    else:
        for gradient in local_shards(gradients):
            gradient.masked_fill_(broken, 0.0)
    return norm, norms
