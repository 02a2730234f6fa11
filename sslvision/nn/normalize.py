"""Normalization of 8-bit images by channel statistics."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """(x / 255 - mean) / std per channel, of uint8 images (B, C, H, W); mean and std on the scale 0..1.

    Both are buffers, so a checkpoint carries the statistics its weights were trained with.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def set(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Replace the statistics, for the same number of channels."""
        self.mean.copy_(torch.tensor(mean))
        self.std.copy_(torch.tensor(std))

    def forward(self, images: Tensor) -> Tensor:
        """Return normalized images in the dtype of the buffers (float32, unless the model was cast)."""
        mean, std = (255 * values.float()[:, None, None] for values in (self.mean, self.std))
        return images.float().sub_(mean).div_(std).to(self.mean.dtype)

    def undo(self, images: Tensor) -> Tensor:
        """Return normalized images (B, C, H, W) on the scale 0..1, clipped."""
        return (images * self.std[:, None, None] + self.mean[:, None, None]).clamp(0, 1)
