"""Updates whose gradients are not finite are left out, and the host need not wait for the device to know."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer


@torch.no_grad()
def skip_nonfinite(optimizer: Optimizer, gradients: list[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Make the next `optimizer.step()` do nothing if a gradient is not finite.

    Fused Adam and AdamW read the flag on the device and leave weights and state untouched. Optimizers without such a kernel
    get gradients of zero in place of all: momentum and weight decay still act once, and nothing is poisoned.

    Args:
        optimizer: about to make an update.
        gradients: of all its parameters, averaged over processes, so that all processes decide alike.

    Returns:
        The norm of all gradients together, not finite if the update is left out, and that of each: scalars on their device.
    """
    norms = torch._foreach_norm(gradients)
    norm = torch.linalg.vector_norm(torch.stack(norms))
    broken = ~norm.isfinite()
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = broken.float()  # type: ignore[attr-defined]  # what torch.amp.GradScaler sets
    else:
        for gradient in gradients:
            gradient.masked_fill_(broken, 0.0)
    return norm, norms
