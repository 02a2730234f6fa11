"""Each gradient scaled by a factor of its own."""

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def scale_each(gradients: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply each of n gradients by its factor (n,), in place.

    Those that together are one tensor, as a captured step lays them out, are multiplied at once. For others torch launches a
    kernel each, 150 for a ViT-S: its fast way takes numbers that the host knows, or factors of the gradients' shapes.
    """
    whole = gradients[0]._base
    if whole is not None and all(gradient._base is whole for gradient in gradients):
        order = sorted(range(len(gradients)), key=lambda place: gradients[place].storage_offset())
        sizes = [gradients[place].numel() for place in order]
        if [gradients[place].storage_offset() for place in order] == [0, *itertools.accumulate(sizes)][:-1]:
            order_there, sizes_there = _on_device((tuple(order), tuple(sizes)), whole.device)
            factors = factors[order_there].repeat_interleave(sizes_there, output_size=sum(sizes))
            whole[: sum(sizes)].mul_(factors)
            return
    torch._foreach_mul_(list(gradients), list(factors.unbind()))


@functools.cache  # what goes to the device does so once: it would wait for it
def _on_device(numbers: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)
