"""Feature maps as images."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def principal_components(features: Tensor, count: int) -> Tensor:
    """Return the first `count` principal components of features (n, D), each scaled to 0..1 between its 2nd and 98th
    percentiles.

    The sign of a component is arbitrary; it is chosen such that the skew is positive, so that colors stay the same in a run.

    Returns:
        (n, count).
    """
    centered = features - features.mean(dim=0)
    _, axes = torch.linalg.eigh(centered.T @ centered)  # ascending
    scores = centered @ axes.flip(1)[:, :count]  # (n, count)
    scores = scores * torch.where(scores.pow(3).sum(dim=0) < 0, -1.0, 1.0)
    low, high = torch.quantile(scores, torch.tensor([0.02, 0.98], device=scores.device, dtype=scores.dtype), dim=0)
    return ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


def at_offsets(maps_of: Callable[[Tensor], Tensor], images: Tensor, stride: int, *, offsets: int = 4) -> Tensor:
    """Return maps with more than one value per patch, from images shifted by fractions of a patch.

    Args:
        maps_of: Maps images (N, C, H, W) to (N, M, rows, columns), one value per patch.
        images: (N, C, H, W); their borders are replicated.
        stride: p, side of a patch in pixels.
        offsets: k, number of shifts along each axis; at most p.

    Returns:
        (N, M, k * rows, k * columns), one value for each p / k pixels: that of the patch around them.
    """
    (H, W), k = images.shape[2:], next(k for k in range(min(offsets, stride), 0, -1) if stride % k == 0)
    step = stride // k
    padded = F.pad(images, [stride] * 4, mode="replicate")
    starts = [stride + offset * step - (stride - step) // 2 for offset in range(k)]
    rows = [
        torch.stack([maps_of(padded[:, :, y : y + H, x : x + W]) for x in starts], dim=-1)  # (N, M, rows, columns, k)
        for y in starts
    ]
    return torch.stack(rows, dim=3).flatten(2, 3).flatten(3, 4)


def enlarged(maps: Tensor, images: Tensor) -> Tensor:
    """Return maps (N, M, rows, columns) enlarged to the size of the images by nearest neighbor."""
    return F.interpolate(maps.float(), size=images.shape[2:], mode="nearest-exact")


def heat(shares: Tensor) -> Tensor:
    """Return values (N, H, W) in 0..1 as colors (N, 3, H, W): black, red, yellow, white."""
    return (3 * shares[:, None] - torch.arange(3, device=shares.device)[:, None, None]).clamp(0, 1)


def class_colors(classes: Tensor, number: int) -> Tensor:
    """Return classes (H, W) as colors (3, H, W): class 0 dark, others spread over the hues; gray outside of 0..number - 1."""
    hues = torch.arange(number) * 0.618034 % 1  # neighbors far apart
    lightness = torch.where(torch.arange(number) % 2 == 0, 0.95, 0.7)
    wheel = (6 * hues[:, None] + torch.tensor([0.0, 4.0, 2.0])) % 6  # red, green, blue
    palette = lightness[:, None] * (0.25 + 0.75 * ((wheel - 3).abs() - 1).clamp(0, 1))  # (number, 3)
    palette[0] = 0.12
    palette = torch.cat([palette, torch.tensor([[0.6, 0.6, 0.6]])])
    inside = (classes >= 0) & (classes < number)
    return palette[torch.where(inside, classes, number)].permute(2, 0, 1)
