"""Pillow's Gaussian blur of a batch, with one standard deviation per image."""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sslvision.nn.exact_products import exact_products

SIGMAS = 256  # steps of the standard deviation per pixel
MAX_CACHED = 2 << 20  # weights, 8 MB; all blurs up to 2 pixels of 32 x 32 pixels have half a million
BOXES = 3  # successive box filters that approximate a Gaussian, as in Pillow


def gaussian_blur(images: Tensor, sigma: Tensor, strongest: float = math.inf) -> Tensor:
    """Blur images (B, C, H, W) as Pillow's GaussianBlur does.

    Args:
        images: Pixels of any range.
        sigma: (B,) standard deviation in pixels; 0 returns the image unchanged.
        strongest: Largest sigma; if given, every sigma must be a multiple of 1 / SIGMAS.
    """
    height, width = images.shape[2:]
    with torch.autocast(images.device.type, enabled=False), exact_products(images.device):
        rows = blur_matrices(sigma, height, strongest)[:, None]  # (B, 1, H, H)
        columns = rows if height == width else blur_matrices(sigma, width, strongest)[:, None]  # (B, 1, W, W)
        return rows @ (images @ columns.transpose(2, 3))


def blur_matrices(sigma: Tensor, length: int, strongest: float) -> Tensor:
    """Return the result of `blur_matrix`, from a cache of all blurs if images are small enough for one."""
    if (
        strongest * SIGMAS + 2
    ) * length**2 > MAX_CACHED or torch.compiler.is_compiling():  # a compiled graph would compute the whole cache
        return blur_matrix(sigma, length)
    every = _every_blur_matrix(length, math.ceil(strongest * SIGMAS), sigma.device)
    return F.embedding((sigma * SIGMAS).long(), every).unflatten(1, (length, length))


@functools.cache
def _every_blur_matrix(length: int, strongest: int, device: torch.device) -> Tensor:
    """Return the matrices (length * length) of all blurs, from none to `strongest` / SIGMAS pixels."""
    sigmas = torch.arange(strongest + 1, dtype=torch.float32, device=device) / SIGMAS
    return blur_matrix(sigmas, length).flatten(1)


def blur_matrix(sigma: Tensor, length: int) -> Tensor:
    """Return the weights of a 1-D blur by three successive box filters with the variance of the Gaussian.

    The boxes end between pixels ("extended box filters", Gwosdek et al. 2011), and border pixels are repeated.

    Args:
        sigma: (B,) standard deviation in pixels.
        length: Length of the axis in pixels.

    Returns:
        (B, length, length); rows sum to 1.
    """
    variance = sigma[:, None, None] ** 2 / BOXES  # of one box
    whole = ((12 * variance + 1).sqrt().sub(1) / 2).floor()  # pixels wholly inside on either side
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    reach = whole + part + 0.5  # (B, 1, 1)
    pixel = torch.arange(length, device=sigma.device, dtype=sigma.dtype)
    between = pixel[1:] - 0.5
    left, right = F.pad(between, (1, 0), value=-torch.inf), F.pad(between, (0, 1), value=torch.inf)
    overlap = torch.minimum(pixel[:, None] + reach, right) - torch.maximum(pixel[:, None] - reach, left)
    return torch.linalg.matrix_power(overlap.clamp_(min=0) / (2 * reach), BOXES)
