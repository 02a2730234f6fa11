"""The effective receptive field: how much each pixel matters to an output position (Luo et al. 2016, arXiv:1701.04128).

A network reads far fewer pixels in earnest than arithmetic allows: the gradient of an output position with respect to the
pixels falls off from its center, roughly as a Gaussian.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

ALMOST_ZERO = 1e-3  # a scale that begins below this hides its branch


class EffectiveField(NamedTuple):
    """An effective receptive field.

    Attributes:
        map: (H, W), the mean absolute gradient of each pixel over images and channels, with sum 1.
        reach: Rows and columns of the smallest rectangle with every pixel whose gradient is not zero.
        center: Row and column of the pixel that is its middle.
        half, most: Side in pixels of the smallest square around the position, cut at the border of the image, with 50 and
            95 % of the gradient.
    """

    map: Tensor
    reach: tuple[int, int]
    center: tuple[float, float]
    half: int
    most: int


def effective_field(
    encode: Callable[[Tensor], Tensor],
    shape: tuple[int, int, int],
    grid: tuple[int, int],
    *,
    prefix: int = 0,
    center: tuple[float, float] | None = None,
    images: int = 8,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> EffectiveField:
    """Return the effective receptive field of the central position of an output map, averaged over random images.

    The images are normal noise, which is what normalized photographs have as mean and deviation. The gradient is that of the
    output vector's product with a random direction, another one for each image: the sum of the channels would not do, as
    behind a layer norm it is constant.

    Args:
        encode: Maps images (1, C, H, W) to tokens (1, prefix + rows * columns, D), as `Backbone.encode`, in eval mode.
        shape: Channels, height and width of the images.
        grid: Rows and columns of the output map.
        prefix: Number of tokens before those of the map.
        center: Row and column of the pixel in the middle of what the position reads; by default the middle of its cell, if
            the map divides the image into cells. Behind padded convolutions with a stride it is elsewhere.
        images: Number of random images, read one at a time.
        seed: Seed of images and directions.
        device: Device of the network.

    Raises:
        ValueError: The gradient is zero everywhere, or not finite.
    """
    rng = torch.Generator().manual_seed(seed)
    row, column = central(grid)
    total = torch.zeros(shape[1:])
    for _ in range(images):
        image = torch.randn(1, *shape, generator=rng).to(device).requires_grad_()
        with torch.enable_grad():
            output = encode(image)[0, prefix + row * grid[1] + column]
        direction = torch.randn(len(output), generator=rng).to(output)
        (gradient,) = torch.autograd.grad(output, image, direction)
        total += gradient[0].abs().sum(dim=0).float().cpu()
    if not total.isfinite().all() or not total.any():
        raise ValueError(
            "the gradient is zero at every pixel" if total.isfinite().all() else "the gradient is not finite"
        )
    if center is None:
        center = ((row + 0.5) * shape[1] / grid[0] - 0.5, (column + 0.5) * shape[2] / grid[1] - 0.5)
    return measured(total / total.sum(), center)


def central(grid: tuple[int, int]) -> tuple[int, int]:
    """Return the row and column of the central position of a map; of an even number, the one behind the middle."""
    return grid[0] // 2, grid[1] // 2


def measured(shares: Tensor, center: tuple[float, float]) -> EffectiveField:
    """Return the field of shares of gradient (H, W) around a center in pixels."""
    rows, columns = (shares.any(dim=axis).nonzero().flatten() for axis in (1, 0))
    reach = (int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1)
    return EffectiveField(shares, reach, center, _side(shares, center, 0.5), _side(shares, center, 0.95))


def _side(shares: Tensor, center: tuple[float, float], share: float) -> int:
    """Return the side of the smallest square around a center with a share of the gradient, at most that of the image."""
    away = [(torch.arange(side) - middle).abs() for side, middle in zip(shares.shape, center, strict=True)]
    distance = torch.maximum(away[0][:, None], away[1][None, :]).flatten()  # Chebyshev's
    order = distance.argsort()
    enough = int((shares.flatten()[order].double().cumsum(0) < share * (1 - 1e-6)).sum())
    return min(int(2 * distance[order[min(enough, len(order) - 1)]]) + 1, max(shares.shape))


@torch.no_grad()
def open_branches(model: nn.Module) -> list[str]:
    """Set the scales of an untrained network that begin at (almost) zero to 1, and return their names.

    Residual branches are often closed when training begins: by the weight of a last batch norm (ResNet), or by a layer scale
    (ConvNeXt, CaiT). Nothing behind such a scale would be seen in the gradient.
    """
    found = []
    for name, parameter in model.named_parameters():
        is_scale = parameter.ndim == 1 and not name.endswith("bias")
        if is_scale and parameter.abs().max() <= ALMOST_ZERO:
            parameter.fill_(1.0)
            found.append(name)
    return found
