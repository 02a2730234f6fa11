"""Gaussian noise on the weights in every training step: a regularizer that prefers flat minima.

Graves 2011, "Practical Variational Inference for Neural Networks" (NIPS), after An 1996. Here the noise of a weight is a share
of the root mean square of its tensor, so that one number fits all layers.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call


class _Applied(nn.Module):
    """A function of a module, as a module."""

    def __init__(self, function: Callable[..., Tensor], module: nn.Module):
        super().__init__()
        self.function, self.module = function, module

    def forward(self, images: Tensor) -> Tensor:
        return self.function(self.module, images)


def with_noise(function: Callable[..., Tensor], module: nn.Module, images: Tensor, *, share: float) -> Tensor:
    """Return `function(module, images)` with noise on the weights for this call; gradients reach the weights themselves.

    Args:
        function: What is computed.
        module: Its trained matrices and filters (two dimensions or more) get noise, from torch's generator; biases, scales and
            frozen weights do not.
        images: (B, C, H, W).
        share: Standard deviation of the noise, as a share of the root mean square of each tensor. 0 for none.
    """
    if not share:
        return function(module, images)
    applied = _Applied(function, module)
    noisy = {
        name: weight + share * weight.detach().square().mean().sqrt() * torch.randn_like(weight)
        for name, weight in applied.named_parameters()
        if weight.requires_grad and weight.ndim >= 2
    }
    with warnings.catch_warnings():  # torch.compile looks at the gradients of all inputs, those of noisy weights too
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf Tensor")
        result: Tensor = functional_call(applied, noisy, (images,))
    return result
