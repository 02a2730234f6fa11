"""Random resized crops, one image at a time in a loader's worker or a whole batch at once on the training device.

Both ways draw the same box for the same image, epoch and seed, and resample with the antialiased bicubic filter of
Pillow (Keys, a = -0.5), which the authors of MAE and DINO used.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sslvision.errors import UsageError
from sslvision.nn.randomness import ImageRandom

KEPT = 4 << 20  # weights, 16 MB; those of 32 x 32 pixels for crops as large are 1.1 million
ATTEMPTS = 10  # boxes tried before the central one is taken, as in torchvision's RandomResizedCrop


@dataclass(frozen=True)
class Crop:
    """One random resized crop of an image.

    Attributes:
        size: side of the result in pixels.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width / height.
        flip: mirror half of the crops.

    Raises:
        UsageError: the scale is out of range.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UsageError(
                f"A crop scale of {list(self.scale)} cannot be: it is two shares of the image's area, "
                "0 < smallest <= largest <= 1."
            )


def crop_boxes(noise: Tensor, height: Tensor, width: Tensor, crop: Crop) -> Tensor:
    """Turn uniform numbers into boxes, with the distribution of torchvision's RandomResizedCrop.

    Args:
        noise: (B, 2 * ATTEMPTS + 2) in [0, 1).
        height, width: (B,) int64 of the images, in pixels.
        crop: the ranges to draw from.

    Returns:
        (B, 4) int64: top, left, height, width.
    """
    area_noise, ratio_noise = noise[:, :ATTEMPTS], noise[:, ATTEMPTS : 2 * ATTEMPTS]
    share = crop.scale[0] + area_noise * (crop.scale[1] - crop.scale[0])  # (B, ATTEMPTS)
    area = share * height[:, None] * width[:, None]
    low, high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    ratio = torch.exp(low + ratio_noise * (high - low))
    box_width, box_height = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (box_width > 0) & (box_width <= width[:, None]) & (box_height > 0) & (box_height <= height[:, None])
    chosen = fits.int().argmax(dim=1, keepdim=True)  # the first attempt that fits
    none_fits = ~fits.any(dim=1)
    # The fallback is the largest central box of an allowed ratio.
    central_width = torch.minimum(width, (height * crop.ratio[1]).round().long().clamp(min=1))
    central_height = torch.minimum(height, (width / crop.ratio[0]).round().long().clamp(min=1))
    box_width = torch.where(none_fits, central_width, box_width.gather(1, chosen)[:, 0])  # (B,)
    box_height = torch.where(none_fits, central_height, box_height.gather(1, chosen)[:, 0])
    top = (noise[:, -2] * (height - box_height + 1)).long()
    left = (noise[:, -1] * (width - box_width + 1)).long()
    top = torch.where(none_fits, (height - box_height) // 2, top)
    left = torch.where(none_fits, (width - box_width) // 2, left)
    return torch.stack([top, left, box_height, box_width], dim=1)


def views_by_kind(crops: Sequence[Crop]) -> dict[Crop, list[int]]:
    """Return which of the crops are of each kind: those are cut together."""
    return {kind: [view for view, crop in enumerate(crops) if crop == kind] for kind in crops}


def crop_noise(rng: ImageRandom, views: Sequence[int]) -> Tensor:
    """Return the uniform numbers (V, B, 2 * ATTEMPTS + 3) that some of a batch's crops are made of."""
    return rng.uniforms([f"crop {view}" for view in views], 2 * ATTEMPTS + 3)


def draw(noise: Tensor, height: Tensor, width: Tensor, crop: Crop) -> tuple[Tensor, Tensor]:
    """Return the boxes (B, 4) for the noise of images whose sizes are (B,), and which crops are mirrored (B,)."""
    flipped = (noise[:, -1] < 0.5) if crop.flip else torch.zeros_like(noise[:, -1], dtype=torch.bool)
    return crop_boxes(noise[:, :-1], height, width, crop), flipped


def crop_each(images: list[Tensor], noise: Tensor, crop: Crop) -> Iterator[Tensor]:
    """Cut V crops of one kind of each of B images of any sizes.

    Drawing boxes is many small operations, which take as long for one as for a hundred.

    Args:
        images: B times (C, H, W) uint8.
        noise: (V, B, 2 * ATTEMPTS + 3) of `crop_noise`.
        crop: their kind.

    Yields:
        V times B crops, (C, size, size) uint8.
    """
    views = len(noise)
    height, width = torch.tensor([image.shape[1:] for image in images]).repeat(views, 1).unbind(1)  # (V * B,) each
    boxes, flipped = draw(noise.flatten(0, 1), height, width, crop)
    for image, box, mirror in zip(images * views, boxes.tolist(), flipped.tolist(), strict=True):
        top, left, rows, columns = box
        cut = resize(image[:, top : top + rows, left : left + columns], (crop.size, crop.size))
        yield cut.flip(2) if mirror else cut


def crop_one(image: Tensor, rng: ImageRandom, view: int, crop: Crop) -> Tensor:
    """Cut one image (C, H, W) uint8 of any size -> (C, size, size) uint8."""
    return next(crop_each([image], crop_noise(rng, [view]), crop))


def crop_batch(images: Tensor, noise: Tensor, crop: Crop) -> Tensor:
    """Cut V crops of one kind of every image of a batch, each by its own box, in two matrix products.

    Args:
        images: (B, C, H, W) uint8.
        noise: (V, B, 2 * ATTEMPTS + 3) of `crop_noise`.
        crop: their kind.

    Returns:
        (V, B, C, size, size) uint8.
    """
    V, B = noise.shape[:2]
    height, width = images.shape[2:]
    if crop.scale[0] == 1 and height == width == crop.size and not crop.flip:
        return images.expand(V, *images.shape)  # every box is the whole image, and resampling the identity
    heights, widths = (torch.full((V * B,), side, device=images.device) for side in (height, width))
    boxes, flipped = draw(noise.flatten(0, 1), heights, widths, crop)
    rows = matrices(boxes[:, 0], boxes[:, 2], height, crop.size).unflatten(0, (V, B))  # (V, B, size, H)
    columns = matrices(boxes[:, 1], boxes[:, 3], width, crop.size)  # (V * B, size, W)
    columns = torch.where(flipped[:, None, None], columns.flip(1), columns)
    with torch.autocast(images.device.type, enabled=False):
        # Pillow's order: columns first, and bytes in between.
        columns = (
            columns.unflatten(0, (V, B)).permute(1, 3, 0, 2).flatten(2)
        )  # (B, W, V * size): an image's crops side by side
        cut = (images.float().flatten(1, 2) @ columns).round_().clamp_(0, 255)  # (B, C * H, V * size)
        cut = cut.view(B, -1, height, V, crop.size).permute(3, 0, 1, 2, 4)  # (V, B, C, H, size)
        cut = (rows[:, :, None] @ cut).round_().clamp_(0, 255)  # (V, B, C, size, size)
    return cut.byte()


def matrices(start: Tensor, extent: Tensor, length: int, size: int) -> Tensor:
    """Return what `resampling_matrix` does, looked up where images are so small that it can be kept for all intervals."""
    if (length + 1) ** 2 * length * size > KEPT:
        return resampling_matrix(start, extent, length, size)
    return _every_matrix(length, size, start.device)[start * (length + 1) + extent]


@functools.cache
def _every_matrix(length: int, size: int, device: torch.device) -> Tensor:
    """Return the matrices of all starts and extents, (length + 1) ** 2 of them; those of no extent are not a number."""
    places = torch.arange(length + 1, device=device)
    return resampling_matrix(places.repeat_interleave(length + 1), places.repeat(length + 1), length, size)


def resampling_matrix(start: Tensor, extent: Tensor, length: int, size: int) -> Tensor:
    """Antialiased bicubic weights of a 1-D crop and resize.

    Args:
        start, extent: (B,) the interval of each image, in pixels; pixels outside have no weight.
        length: of the axis in pixels.
        size: of the result in pixels.

    Returns:
        (B, size, length); rows sum to 1.
    """
    start, extent = start[:, None, None].float(), extent[:, None, None].float()
    scale = extent / size  # source pixels per result pixel
    # fp32 whatever torch's default is: matrices may be kept.
    result = torch.arange(size, dtype=torch.float32, device=start.device)[:, None] + 0.5  # (size, 1)
    source = torch.arange(length, dtype=torch.float32, device=start.device)[None] + 0.5  # (1, length)
    inside = ((source > start) & (source < start + extent)).float()  # (B, 1, length)
    # In place where it can be: this is most of the work.
    distance = ((source - start) - result * scale).abs_().div_(scale.clamp(min=1)).clamp_(max=2)  # (B, size, length)
    near = (1.5 * distance).sub_(2.5).mul_(distance * distance).add_(1)
    far = (-0.5 * distance).add_(2.5).mul_(distance).sub_(4).mul_(distance).add_(2)  # 0 at a distance of 2
    weight = torch.where(distance < 1, near, far).mul_(inside)
    return weight.div_(weight.sum(dim=2, keepdim=True))


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize one image (C, H, W) uint8 by antialiased bicubic interpolation, with Pillow's rounding."""
    if tuple(image.shape[1:]) == size:
        return image
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # image[None] hides from torch that bytes lie as (H, W, C)
    return F.interpolate(batch, size=size, mode="bicubic", antialias=True)[0]


def center_crop(image: Tensor, size: int) -> Tensor:
    """Resize the short side to 8/7 of `size` and cut the centre, as ImageNet models are evaluated.

    Images of exactly size x size stay as they are.
    """
    height, width = image.shape[1:]
    if (height, width) == (size, size):
        return image
    short = max(size, round(size * 8 / 7))
    factor = short / min(height, width)
    image = resize(image, (max(short, round(height * factor)), max(short, round(width * factor))))
    top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
    return image[:, top : top + size, left : left + size]
