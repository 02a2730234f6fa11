"""A batch, as the loader passes it to a method."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslvision.errors import UsageError


class Batch(NamedTuple):
    """One process's share of a batch: B images.

    Attributes:
        crops: One uint8 tensor (B, C, H, W) for each crop of the method, of the crop's size.
        indices: (B,) int64, data set index of each requested image, which its random numbers depend on.
        epoch: (B,) int64.
        unreadable: (index, reason) of images that could not be decoded and were replaced by others.
        shown: (B,) int64, data set index of each image in the crops, which its label belongs to. Differs from `indices` for
            replaced images.
    """

    crops: list[Tensor]
    indices: Tensor
    epoch: Tensor
    unreadable: list[tuple[int, str]]
    shown: Tensor


def whole_images(batch: Any, *, channels: int) -> Tensor:
    """Return the images (B, C, H, W) uint8 of a batch of any DataLoader: a tensor, or the first of a tuple or dictionary.

    Args:
        batch: Images (B, C, H, W): uint8, or floats in 0..1, alone or first in a tuple, a list or a dictionary.
        channels: C.

    Raises:
        UsageError: It has no such images.
    """
    images = batch
    if isinstance(batch, Mapping) or (isinstance(batch, list | tuple) and batch):
        images = next(iter(batch.values() if isinstance(batch, Mapping) else batch), None)
    what = f"a {type(images).__name__}"
    if isinstance(images, Tensor):
        what = f"{images.dtype} of shape {tuple(images.shape)}"
        if images.ndim == 4 and images.shape[1] == channels:
            if images.dtype == torch.uint8:
                return images
            if images.is_floating_point():
                low, high = (float(value) for value in images.aminmax())
                if 0 <= low <= high <= 1:
                    return (images * 255).round().byte()
                what += f" with values from {low:.3g} to {high:.3g}"
    raise UsageError(
        f"Batches of this DataLoader begin with {what}: give images (B, {channels}, H, W), as uint8 or as floats in 0..1 "
        "(ToTensor without Normalize). The method crops, augments and normalizes them by itself. Images of different sizes "
        "come from sslvision's own data sources, or from a Resize."
    )
