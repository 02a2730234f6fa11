"""Mixup, CutMix, Cutout and random erasing of a whole batch on the training device."""

import math

import torch
from torch import Tensor

from sslvision.augment.crops import ATTEMPTS, Crop, crop_boxes
from sslvision.augment.randomness import ImageRandom
from sslvision.errors import UsageError

TRIES = 32  # attempts of Jöhnk's algorithm: all are rejected at most once in 2^32 draws
ERASED = Crop(1, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))  # only its area and ratio are used

# B images, K classes


def mix_images(
    images: Tensor, targets: Tensor, rng: ImageRandom, *, mixup: float, cutmix: float
) -> tuple[Tensor, Tensor]:
    """Mix every image with the next image of the batch, and its target by the same share.

    If both are enabled, each image gets one of the two with probability 1/2.

    Args:
        images: (B, C, H, W).
        targets: (B, K) shares of the classes.
        rng: Source of the images' random numbers.
        mixup: Alpha of Mixup (Zhang et al. 2018, arXiv:1710.09412): an image keeps a share of every pixel, drawn from
            Beta(alpha, alpha). 0 disables it.
        cutmix: Alpha of CutMix (Yun et al. 2019, arXiv:1905.04899): a box with 1 - share of the area comes from the next
            image. Boxes are clipped at the border, and the target follows the area actually pasted. 0 disables it.

    Returns:
        The mixed images and targets.

    Raises:
        UsageError: An alpha is out of range.
    """
    check_share("mixup", mixup)
    check_share("cutmix", cutmix)
    if not mixup and not cutmix:
        return images, targets
    height, width = images.shape[2:]
    pasted = rng.uniform("mix choice", 1)[:, 0] < (0.5 if mixup and cutmix else float(cutmix > 0))  # (B,) else mixed up
    alpha = torch.where(pasted, cutmix or 1.0, mixup or 1.0)  # (B,); an alpha of 0 is never chosen
    share = beta(rng.uniform("mix share", 2 * TRIES), alpha)  # (B,), of an image in its result
    box = box_around(rng.uniform("mix box", 2), (1 - share).sqrt(), height, width) & pasted[:, None, None]  # (B, H, W)
    share = torch.where(pasted, 1 - box.sum(dim=(1, 2)) / (height * width), share)
    kept = torch.where(pasted, 1.0, share)[:, None, None].masked_fill(box, 0.0)[:, None]  # (B, 1, H, W), of each pixel
    images = torch.lerp(images.roll(-1, 0), images, kept.to(images.dtype))
    return images, torch.lerp(targets.roll(-1, 0), targets, share[:, None].to(targets.dtype))


def beta(noise: Tensor, alpha: Tensor) -> Tensor:
    """Turn uniform random numbers into draws from Beta(alpha, alpha), by Jöhnk's algorithm (1964).

    X = U^(1/alpha) and Y = V^(1/alpha), drawn until X + Y <= 1, give X / (X + Y). In logarithms, because the powers
    underflow for a small alpha.

    Args:
        noise: (B, 2 * TRIES) in [0, 1), multiples of 2^-24.
        alpha: (B,), more than 0 and at most 1.

    Returns:
        (B,).
    """
    log = (noise + 2**-25).log() / alpha[:, None]  # (B, 2 * TRIES); the middle of each step, so never log 0
    x, y = log.unflatten(1, (2, TRIES)).unbind(1)  # (B, TRIES) each
    first = (torch.logaddexp(x, y) <= 0).int().argmax(dim=1, keepdim=True)  # the first accepted
    return (x - y).gather(1, first)[:, 0].sigmoid()


def box_around(noise: Tensor, side: Tensor, height: int, width: int) -> Tensor:
    """Return masks (B, H, W) of boxes around uniformly drawn centers, clipped at the border.

    Args:
        noise: (B, 2) in [0, 1) for the centers of the boxes.
        side: (B,) side of each box as a share of the image's side.
        height, width: Size of the images in pixels.
    """

    def inside(middle: Tensor, length: int) -> Tensor:
        pixel, middle = torch.arange(length, device=noise.device), (middle * length).long()[:, None]
        extent = (side * length).long()[:, None]
        start = middle - extent // 2
        return (pixel >= start) & (pixel < start + extent)  # (B, length)

    return inside(noise[:, 0], height)[:, :, None] & inside(noise[:, 1], width)[:, None]


def erase(images: Tensor, rng: ImageRandom, probability: float) -> Tensor:
    """Fill a random box of some images with normal noise, different in each pixel.

    Source: Zhong et al. 2020 (arXiv:1708.04896), with the ranges and the noise of MAE's fine-tuning: 2 % to a third of the
    area, aspect ratio 0.3 to 1 / 0.3.

    Args:
        images: (B, C, H, W) normalized, so that the noise has their mean and deviation.
        rng: Source of the images' random numbers.
        probability: Probability that a box of an image is erased; 0 disables it.

    Raises:
        UsageError: The probability is out of range.
    """
    check_share("erase", probability)
    if not probability:
        return images
    B, channels, height, width = images.shape
    chosen = rng.uniform("erase", 1) < probability  # (B, 1)
    heights, widths = (torch.full_like(rng.index, side) for side in (height, width))  # (B,), (B,)
    (boxes,) = crop_boxes(rng.uniforms(["erase box"], 2 * ATTEMPTS + 2), heights, widths, [ERASED])  # (B, 4)
    top, left, rows, columns = boxes.T[..., None]
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    inside_y, inside_x = (y >= top) & (y < top + rows) & chosen, (x >= left) & (x < left + columns)  # (B, H), (B, W)
    box = (inside_y[:, :, None] & inside_x[:, None])[:, None]  # (B, 1, H, W)
    noise = rng.uniform("erase noise", channels * height * width).view(B, channels, height, width)
    normal = math.sqrt(2) * torch.erfinv(2 * noise - 1 + 2**-24)  # the middle of each step, so never -1 or 1
    return torch.where(box, normal.to(images.dtype), images)


def cut_out(images: Tensor, rng: ImageRandom, side: float) -> Tensor:
    """Set a square of each image to zero, its mean, around a center drawn uniformly; at the border less of it is inside.

    Source: DeVries and Taylor 2017 (arXiv:1708.04552).

    Args:
        images: (B, C, H, W) normalized.
        rng: Source of the images' random numbers.
        side: Side of the square as a share of the image's side; 0 disables it.

    Raises:
        UsageError: The share is out of range.
    """
    check_share("cutout", side)
    if not side:
        return images
    height, width = images.shape[2:]
    centers = rng.uniform("cutout", 2)  # (B, 2)
    boxes = box_around(centers, torch.full_like(centers[:, 0], side), height, width)  # (B, H, W)
    return images.masked_fill(boxes[:, None], 0.0)


def check_share(name: str, value: float) -> None:
    """Raise UsageError for an alpha of Mixup or CutMix, a probability of erasing, or a side of Cutout, that is out of range."""
    if not 0 <= value <= 1:
        what = {"erase": "a probability", "cutout": "a share of the image's side"}.get(
            name, "the alpha of a Beta distribution, of which those above 1 are not drawn"
        )
        raise UsageError(f"{name}={value:g} must be from 0 (none) to 1: it is {what}.")
