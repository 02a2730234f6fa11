"""From what tokens hold to what people can look at."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def principal_components(features: Tensor, count: int) -> Tensor:
    """Return the first `count` principal components of features (n, D), each from 0 to 1 but for its outermost percents.

    A component's sign is arbitrary: here its skew is positive, so that pictures of one run keep their colors.

    Returns:
        (n, count).
    """
    centerd = features - features.mean(dim=0)
    _, axes = torch.linalg.eigh(centerd.T @ centerd)  # ascending
    scores = centerd @ axes.flip(1)[:, :count]  # (n, count)
    scores = scores * torch.where(scores.pow(3).sum(dim=0) < 0, -1.0, 1.0)
    low, high = torch.quantile(scores, torch.tensor([0.02, 0.98], device=scores.device, dtype=scores.dtype), dim=0)
    return ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


def at_offsets(maps_of: Callable[[Tensor], Tensor], images: Tensor, stride: int, *, offsets: int = 4) -> Tensor:
    """Return maps finer than one value to a patch: those of images moved by parts of a patch, put together.

    Args:
        maps_of: images (N, C, S, S) -> maps (N, M, rows, columns), a value for each patch.
        images: (N, C, S, S); their borders go on outside.
        stride: p, side of a patch in pixels.
        offsets: k, along each axis; no more than p.

    Returns:
        (N, M, k * rows, k * columns): a value for each p / k pixels, that of the patch around them.
    """
    S, k = images.shape[-1], next(k for k in range(min(offsets, stride), 0, -1) if stride % k == 0)
    step = stride // k
    padded = F.pad(images, [stride] * 4, mode="replicate")
    starts = [stride + offset * step - (stride - step) // 2 for offset in range(k)]
    rows = [
        torch.stack([maps_of(padded[:, :, y : y + S, x : x + S]) for x in starts], dim=-1)  # (N, M, rows, columns, k)
        for y in starts
    ]
    return torch.stack(rows, dim=3).flatten(2, 3).flatten(3, 4)


def enlarged(maps: Tensor, images: Tensor) -> Tensor:
    """Return maps (N, M, rows, columns) at the size of the images, each value a block."""
    return F.interpolate(maps.float(), size=images.shape[2:], mode="nearest-exact")


def heat(shares: Tensor) -> Tensor:
    """Return shares (N, S, S) from 0 to 1 as colors (N, 3, S, S): black, red, yellow, white."""
    return (3 * shares[:, None] - torch.arange(3, device=shares.device)[:, None, None]).clamp(0, 1)
