"""The filters that read the pixels: those of the first convolution, or of a patch embedding, which is one."""

import torch
from torch import Tensor, nn


def first_convolution(model: nn.Module, channels: int) -> str | None:
    """Return the name of the first convolution that reads images of so many channels; None if there is none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == channels and module.groups == 1:
            return name
    return None


def filters_of(model: nn.Module, name: str) -> Tensor:
    """Return the filters (N, C, h, w) of a convolution, on the CPU."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Conv2d)
    return module.weight.detach().float().cpu()


def strongest(filters: Tensor, count: int) -> Tensor:
    """Return the indices of at most `count` filters (N, C, h, w) with the largest norms, the largest first."""
    return torch.linalg.vector_norm(filters.flatten(1), dim=1).argsort(descending=True, stable=True)[:count]
