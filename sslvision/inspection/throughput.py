"""How many images a second a network reads."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn


def forward_rates(model: nn.Module, images: Tensor, *, repeats: int) -> list[float]:
    """Return images per second of each of several forward passes in evaluation mode, after one that is not timed."""
    model.eval()

    @torch.no_grad()
    def step() -> None:
        model(images)

    return _rates(step, images, repeats)


def training_rates(model: nn.Module, images: Tensor, *, repeats: int) -> list[float]:
    """Return images per second of each of several forward and backward passes in training mode, after one that is not timed.

    No optimizer, no augmentation, no loss beyond a sum. The running statistics of the network change.
    """
    model.train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(images).sum().backward()

    try:
        return _rates(step, images, repeats)
    finally:
        model.zero_grad(set_to_none=True)


def _rates(step: Callable[[], None], images: Tensor, repeats: int) -> list[float]:
    rates = []
    for number in range(repeats + 1):
        _wait(images.device)
        started = time.perf_counter()
        step()
        _wait(images.device)
        if number:
            rates.append(len(images) / (time.perf_counter() - started))
    return rates


def _wait(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
